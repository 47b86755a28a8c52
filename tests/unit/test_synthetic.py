"""The synthetic world: its captions are true of its pixels, its held-out combinations are never seen in training."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from itertools import islice

import av
import numpy as np
import pytest

from data_tools.synthetic.films import VECTORS, WEIGHTS, film
from data_tools.synthetic.generate import generate
from data_tools.synthetic.scenes import COLOURS, RELATIONS, SHAPES, SIZES, combinations, scene, shape_mask
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples
from dsmoe_vl.errors import DataError

SMALL = {"images": 60, "videos": 12, "eval_images": 30, "eval_videos": 10}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "synthetic"
    generate(folder, **SMALL)
    return folder


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(meta):
    """Every (shape, colour) that a sample shows at any time."""
    for item in meta["attributes"]:
        yield item["shape"], item["colour"]
        if "becomes" in item:
            yield item["shape"], item["becomes"]


def centroid(picture, colour):
    """Centre (x, y) of the pixels near a colour, and how many there are."""
    distance = np.abs(picture.astype(int) - COLOURS[colour]).max(axis=2)
    rows, columns = np.nonzero(distance < 60)
    return (columns.mean(), rows.mean(), len(rows)) if len(rows) else (np.nan, np.nan, 0)


def test_folders_counts_and_splits(world):
    assert sorted(path.name for path in world.iterdir()) == [
        "images_eval",
        "images_train",
        "videos_eval",
        "videos_train",
    ]
    for name, count in SMALL.items():
        folder = "_".join(reversed(name.split("_"))) if "_" in name else f"{name}_train"
        index = ShardIndex.load(world / folder)
        assert index.samples == count
        assert index.split == folder.rpartition("_")[2]


def test_same_arguments_same_bytes(world, tmp_path):
    generate(tmp_path / "again", **SMALL)
    assert files(world) == files(tmp_path / "again")
    generate(tmp_path / "other", **SMALL, seed=2)
    assert files(world) != files(tmp_path / "other")


def test_same_film_same_bytes_whatever_the_memory_held_before():
    made = set()
    for _ in range(150):
        media, _ = film(np.random.default_rng(1), False, 48, 2)
        made.add(media)
        decode_video(media, 4)  # leaves its buffers to the next encoder
    assert len(made) == 1


def test_sample_does_not_depend_on_how_many_there_are(world, tmp_path):
    generate(tmp_path / "few", images=5, videos=2, eval_images=0, eval_videos=0)
    assert not (tmp_path / "few" / "images_eval").exists()
    for name in ("images_train", "videos_train"):
        source = SourceConfig.at(tmp_path / "few" / name)
        few, many = list(iterate_samples(source)), iterate_samples(SourceConfig.at(world / name))
        assert few == [dataclasses.replace(sample, source=source) for sample in islice(many, len(few))]


@pytest.mark.parametrize("third", [list(SIZES), list(VECTORS)])
def test_held_out_combinations_leave_every_coloured_shape_to_training(third):
    seen, held_out = (set(combinations(third, part)) for part in (False, True))
    assert not held_out & seen
    assert len(held_out) + len(seen) == len(SHAPES) * len(COLOURS) * len(third)
    assert {combination[:2] for combination in seen} == {(shape, colour) for shape in SHAPES for colour in COLOURS}
    for part in (seen, held_out):
        assert [set(values) for values in zip(*part, strict=True)] == [set(SHAPES), set(COLOURS), set(third)]


@pytest.mark.parametrize(
    ("kind", "third", "values"), [("images", "size", list(SIZES)), ("videos", "motion", list(VECTORS))]
)
def test_training_and_evaluation_show_disjoint_combinations(world, kind, third, values):
    held_out = set(combinations(values, True))
    for split in ("train", "eval"):
        for sample in iterate_samples(SourceConfig.at(world / f"{kind}_{split}")):
            items = {(item["shape"], item["colour"], item[third]) for item in sample.meta["attributes"]}
            assert bool(items & held_out) == (split == "eval")


def test_captions_are_short_lower_case_and_name_what_is_shown(world):
    for folder in world.iterdir():
        for sample in iterate_samples(SourceConfig.at(folder)):
            captions = sample.meta["captions"]
            assert sample.text == captions[0]
            assert len(set(captions)) == len(captions) >= 2
            for caption in [*captions, sample.meta.get("summary", captions[0])]:
                assert caption == caption.lower() and len(caption.split()) <= 20
                for shape, colour in shown(sample.meta):
                    assert shape in caption and colour in caption
                for other in set(SHAPES) - {shape for shape, _ in shown(sample.meta)}:
                    assert other not in caption.split()


def test_relations_and_sizes_are_true_of_the_pixels():
    checked = Counter()
    for number in range(150):
        media, meta = scene(np.random.default_rng(number), number % 2 == 0, 64, 2)
        picture = decode_image(media)
        assert picture.shape == (meta["height"], meta["width"], 3) and not any(side % 16 for side in picture.shape[:2])
        items = meta["attributes"]
        places = [centroid(picture, item["colour"]) for item in items]
        if len(items) == 1:
            diameter = 16 * SIZES[items[0]["size"]]
            full = np.asarray(shape_mask(items[0]["shape"], diameter)).mean() / 255 * diameter**2
            assert 0.7 * full < places[0][2] < 1.15 * full
            assert meta["relation"] is None
        elif items[0]["colour"] != items[1]["colour"]:
            dx, dy = (places[1][axis] - places[0][axis] for axis in (0, 1))
            expected = ("left of" if dx > 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
            assert meta["relation"] == expected
            checked[expected] += 1
            for caption in meta["captions"]:
                first = caption.index(f"{items[0]['colour']} {items[0]['shape']}")
                second = caption.index(f"{items[1]['colour']} {items[1]['shape']}")
                assert (expected if first < second else RELATIONS[expected]) in caption
    assert set(checked) == set(RELATIONS)


def test_shapes_can_be_told_apart_when_small():
    masks = [np.asarray(shape_mask(shape, 16)).astype(float) / 255 for shape in SHAPES]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert np.abs(first - second).mean() > 0.1


def test_videos_are_ordinary_h264(world):
    for sample in iterate_samples(SourceConfig.at(world / "videos_train")):
        with av.open(io.BytesIO(sample.media)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height, stream.average_rate) == (64, 64, sample.meta["fps"])
        assert len(frames) == sample.meta["frames"] == len(sample.meta["importance"])
        assert sample.meta["duration_seconds"] == sample.meta["frames"] / sample.meta["fps"]


def test_motion_colour_changes_and_importance_are_true_of_the_frames():
    seen = Counter()
    for number in range(40):
        media, meta = film(np.random.default_rng(number), number % 2 == 0, 64, 2)
        frames = decode_video(media, meta["frames"])
        for event in meta["events"]:
            assert 0 <= event["time_seconds"] < meta["duration_seconds"]
            nearest = round(event["time_seconds"] * meta["fps"])
            assert meta["importance"][nearest] >= WEIGHTS[event["name"].split()[0]]
        assert all(0 <= value <= 1 for value in meta["importance"])
        if len({item["colour"] for item in meta["attributes"]}) < len(meta["attributes"]):
            continue
        for item in meta["attributes"]:
            whole = [(x, y) for _, picture in frames for x, y, n in [centroid(picture, item["colour"])] if n > 40]
            moved = np.subtract(whole[-1], whole[0])
            assert np.dot(moved, VECTORS[item["motion"]]) > 5
            if "becomes" in item:
                turn = next(event["time_seconds"] for event in meta["events"] if event["name"].startswith("turns"))
                for seconds, picture in frames:
                    if abs(seconds - turn) > 0.01:
                        before, after = (centroid(picture, item[name])[2] for name in ("colour", "becomes"))
                        assert (after == 0) if seconds < turn else (before < 10 < after)
            seen["becomes" if "becomes" in item else item["motion"]] += 1
    assert set(seen) == {"becomes", *VECTORS}


def test_events_happen_at_the_frames_that_show_them():
    seen = Counter()
    for number in range(60):
        media, meta = film(np.random.default_rng(number), number % 2 == 0, 64, 2)
        colours = {item["colour"] for item in meta["attributes"]}
        if len(colours) < len(meta["attributes"]):
            continue
        frames = [picture for _, picture in decode_video(media, meta["frames"])]
        found = [[centroid(picture, colour) for colour in colours] for picture in frames]
        for event in meta["events"]:
            at, kind = round(event["time_seconds"] * meta["fps"]), event["name"].split()[0]
            if kind == "enters":
                assert all(n <= 2 for places in found[:at] for _, _, n in places)
                assert any(n > 2 for _, _, n in found[at])
            elif kind in ("stops", "collide"):
                turns = [e["time_seconds"] for e in meta["events"] if e["name"].startswith("turns")]
                until = round(turns[0] * meta["fps"]) if turns else len(frames)
                rest = [np.array(places)[:, :2] for places in found[at:until]]
                if not rest:
                    continue  # it changes its colour as it stops
                assert np.abs(np.array(rest) - rest[0]).max() < 1
                assert np.abs(np.array(found[at - 1])[:, :2] - rest[0]).max() > 1
            seen[kind] += 1
    assert seen.keys() == {"enters", "stops", "turns", "collide"}


@pytest.mark.parametrize("size", [48, 80, 128])
def test_other_sizes(tmp_path, size):
    generate(tmp_path, images=8, videos=2, eval_images=2, eval_videos=2, size=size, max_objects=1)
    for sample in iterate_samples(SourceConfig.at(tmp_path / "images_train")):
        picture = decode_image(sample.media)
        assert max(picture.shape) == size and not any(side % 16 for side in picture.shape[:2])
        assert len(sample.meta["attributes"]) == 1
    for sample in iterate_samples(SourceConfig.at(tmp_path / "videos_train")):
        assert decode_video(sample.media, 1)[0][1].shape == (size, size, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 50}, "--size 50"),
        ({"size": 32}, "--size 32"),
        ({"max_objects": 3}, "--max-objects 3"),
        ({"eval_videos": -1}, "--eval-videos -1"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_arguments_name_the_option(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        generate(tmp_path, **arguments)


def test_an_interrupted_run_can_be_repeated_and_a_finished_one_is_kept(world, tmp_path):
    (tmp_path / ".unfinished" / "images_train").mkdir(parents=True)
    (tmp_path / ".unfinished" / "images_train" / "train-00000.tar").write_bytes(b"half")
    generate(tmp_path, **SMALL)
    assert files(tmp_path) == files(world)
    with pytest.raises(DataError, match="images_train exists already"):
        generate(tmp_path, **SMALL)
