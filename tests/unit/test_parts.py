"""Conversions in parts: the same bytes whoever makes them and however often they are interrupted."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref

import pytest
from PIL import Image

from data_tools.check import Reencoding
from data_tools.convert import convert
from data_tools.formats import Record, Stored
from data_tools.parts import Parts, Settings, make_part
from data_tools.workforce import Hosts
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import ConfigError, DataError
from tests.conftest import REPOSITORY
from tests.support.datasets import photo


@pytest.fixture
def coco(tmp_path):
    """Options of a COCO conversion of 60 photos, every seventh of them missing."""
    names = [f"{i:03}.jpg" for i in range(60)]
    for i, name in enumerate(names):
        if i % 7 != 3:
            photo(tmp_path / "photos" / name, (30 + i, 20))
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"image_id": i, "caption": f"photo {i}"} for i in range(60)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return ["coco", "--images", tmp_path / "photos", "--annotations", tmp_path / "captions.json",
            "--samples-per-shard", 7, "--max-rejected", 0.5]  # fmt: skip


def command(options, output, workers=1):
    return [sys.executable, "-m", "data_tools.convert", *map(str, options), "--output", str(output),
            "--workers", str(workers)]  # fmt: skip


def run(arguments):
    return subprocess.run(
        arguments, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )  # fmt: skip


def content(folder):
    """Hash of every file that is not hidden or temporary."""
    files = [path for path in folder.glob("[!.]*") if path.suffix != ".partial"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(count):
    return [Record(f"{i}", "image", None, [f"{i}"], problem="broken: as a test") for i in range(count)]


def test_processes_and_hosts_do_not_change_a_byte(coco, tmp_path):
    for name, arguments in {
        "one": command(coco, tmp_path / "one"),
        "three": command(coco, tmp_path / "three", workers=3),
        "hosts": [
            "mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", *command(coco, tmp_path / "hosts", 2)
        ],
    }.items():  # fmt: skip
        result = run(arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("wrote 51 samples") == 1, name
        assert "rejected: 9 missing file" in result.stdout
    assert content(tmp_path / "one") == content(tmp_path / "three") == content(tmp_path / "hosts")
    assert len(list(tmp_path.glob("one/*.tar"))) == 9
    keys = [sample.key for sample in iterate_samples(SourceConfig.at(tmp_path / "one"))]
    assert keys == [f"{i}" for i in range(60) if i % 7 != 3]


def test_an_error_on_one_host_ends_all(coco, tmp_path):
    (tmp_path / "captions.json").write_text("{}")
    result = run(
        ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", *command(coco, tmp_path / "out")]
    )  # fmt: skip
    assert result.returncode == 2 and "error: " in result.stderr and "Traceback" not in result.stderr


def test_killed_at_any_moment_and_repeated(coco, tmp_path):
    assert run(command(coco, tmp_path / "unbroken")).returncode == 0
    rng = random.Random(1)
    started = time.monotonic()
    assert run(command(coco, tmp_path / "timed", workers=2)).returncode == 0
    whole_seconds = time.monotonic() - started
    for _ in range(6):
        process = subprocess.Popen(
            command(coco, tmp_path / "killed", workers=2), cwd=REPOSITORY, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(whole_seconds * (0.4 + 0.6 * rng.random()))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "killed" / "index.json").exists() and not (tmp_path / "killed" / ".unfinished").exists():
            break
        # What has its final name is whole, whenever the kill came.
        assert {**content(tmp_path / "unbroken"), **content(tmp_path / "killed")} == content(tmp_path / "unbroken")
    else:
        assert run(command(coco, tmp_path / "killed", workers=2)).returncode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "unbroken")


def test_continues_with_what_is_missing(tmp_path, monkeypatch):
    found = [Record(f"{i}", "image", photo(tmp_path / f"{i}.jpg"), [f"{i}"]) for i in range(9)]
    settings = Settings("test", samples_per_shard=2)
    missing = Parts(tmp_path / "out", settings).open(found)
    assert [part.folder.name for part in missing] == [f"part-00000{number}" for number in range(5)]
    assert [part.size for part in missing] == [2, 2, 2, 2, 1]
    for number in (1, 3):
        make_part(missing[number], settings, lambda n: None)
    (tmp_path / "2.jpg").unlink()  # part 1 is done and does not look at it again
    assert Parts(tmp_path / "out", settings).open(found) == [missing[0], missing[2], missing[4]]
    assert convert(found, tmp_path / "out", settings).written == 9
    assert [sample.text for sample in iterate_samples(SourceConfig.at(tmp_path / "out"))] == [f"{i}" for i in range(9)]
    assert not (tmp_path / "out" / ".unfinished").exists()


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_publishing_may_be_interrupted(tmp_path, monkeypatch, moved):
    found = [Record(f"{i}", "image", photo(tmp_path / f"{i}.jpg"), [f"{i}"]) for i in range(6)]
    settings = Settings("test", samples_per_shard=2)
    convert(found, tmp_path / "unbroken", settings)
    replace, left = os.replace, [moved]

    def failing(source, target):
        if str(target).endswith(".tar") and "part-" not in str(target):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    if moved < 3:
        with pytest.raises(KeyboardInterrupt):
            convert(found, tmp_path / "out", settings)
    monkeypatch.undo()
    convert(found, tmp_path / "out", settings)
    assert content(tmp_path / "out") == content(tmp_path / "unbroken")


def test_interrupted_at_any_call_and_repeated(tmp_path, monkeypatch):
    """Any call that changes a folder."""
    found = [Record(f"{i}", "image", photo(tmp_path / f"{i}.jpg"), [f"{i}"]) for i in range(4)] + records(5)[4:]
    settings = Settings("test", samples_per_shard=2)
    convert(found, tmp_path / "unbroken", settings, max_rejected=0.5)
    for calls in itertools.count():
        output, left = tmp_path / f"out-{calls}", itertools.count(-calls)
        with monkeypatch.context() as patch:
            for function in ("mkdir", "replace", "rename", "unlink", "rmdir"):
                patch.setattr(os, function, interrupted(getattr(os, function), left))
            try:
                convert(found, output, settings, max_rejected=0.5)
                break
            except KeyboardInterrupt:
                pass
        if not (output / "index.json").exists() or (output / ".unfinished").exists():
            convert(found, output, settings, max_rejected=0.5)
        assert content(output) == content(tmp_path / "unbroken")
    assert calls > 20


def interrupted(function, left):
    def call(*args, **options):
        if next(left) == 0:
            raise KeyboardInterrupt
        return function(*args, **options)

    return call


def test_another_conversion_in_the_same_folder_is_refused(tmp_path):
    settings = Settings("test")
    Parts(tmp_path / "out", settings).open(records(3))
    for others, other_settings in ((records(4), settings), (records(3), Settings("other"))):
        with pytest.raises(DataError, match=r"unfinished conversion of other records .* delete the folder"):
            Parts(tmp_path / "out", other_settings).open(others)
    assert len(Parts(tmp_path / "out", settings).open(records(3))) == 1


def test_keys_that_occur_twice_are_found_before_any_work(tmp_path):
    twice = [*records(3), *records(1)]
    with pytest.raises(DataError, match=r"two records have the key '0' .*identifiers must be unique"):
        convert(twice, tmp_path / "out", Settings("test"))
    assert not (tmp_path / "out").exists()


def test_keys_of_equal_hash_are_no_equal_keys(tmp_path, monkeypatch):
    """What is kept of a key is a hash: records of equal ones are looked at again."""
    monkeypatch.setattr("data_tools.record_files._hash", lambda key: len(key))
    found = [Record(name, "image", photo(tmp_path / f"{name}.jpg"), [name]) for name in ("a", "b", "long")]
    assert convert(found, tmp_path / "out", Settings("test")).written == 3
    with pytest.raises(DataError, match=r"two records have the key 'b' \(number 2, b.jpg, .* and number 4"):
        convert([*found, found[1]], tmp_path / "other", Settings("test"))


def test_no_process_has_all_records_in_memory(tmp_path, monkeypatch):
    """They are written while they are read, and a part's are read again when it is made."""
    alive: list[weakref.ref[Record]] = []
    most = 0

    def many():
        nonlocal most
        for number in range(200):
            record = Record(f"{number}", "image", None, [], problem="broken: as a test")
            alive.append(weakref.ref(record))
            most = max(most, sum(of() is not None for of in alive))
            yield record

    monkeypatch.setattr("data_tools.parts._check_budget", lambda outcome, most: None)  # all are rejected
    outcome = convert(many(), tmp_path / "out", Settings("test", samples_per_shard=10))
    assert outcome.reasons["broken"] == 200 and most <= 21
    assert [json.loads(line)["id"] for line in outcome.listing.read_text().splitlines()] == [f"{i}" for i in range(200)]


def test_problems_of_annotations_are_listed(tmp_path):
    found = [*records(1), Record("good", "image", photo(tmp_path / "a.jpg"), ["a photo"])]
    outcome = convert(found, tmp_path / "out", Settings("test"), max_rejected=0.5)
    assert outcome.summary() == "1 broken"
    (line,) = map(json.loads, outcome.listing.read_text().splitlines())
    assert line == {"id": "0", "reason": "broken", "detail": "as a test"}


def test_large_images_are_made_smaller_where_asked(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    Image.effect_noise((400, 200), 50).convert("RGB").save(file, "JPEG", exif=turned)
    (tmp_path / "turned.jpg").write_bytes(file.getvalue())
    Image.effect_noise((80, 60), 50).convert("RGBA").save(tmp_path / "small.png")
    found = [Record(name, "image", tmp_path / name, [name]) for name in ("turned.jpg", "small.png")]

    convert(found, tmp_path / "kept", Settings("test"))
    kept = list(iterate_samples(SourceConfig.at(tmp_path / "kept")))
    assert [one.media for one in kept] == [(tmp_path / one.text).read_bytes() for one in kept]
    assert [(one.meta["width"], one.meta["height"]) for one in kept] == [(200, 400), (80, 60)]

    convert(found, tmp_path / "side", Settings("test", reencoding=Reencoding(max_side=100)))
    large, small = iterate_samples(SourceConfig.at(tmp_path / "side"))
    assert (large.meta["width"], large.meta["height"]) == Image.open(io.BytesIO(large.media)).size == (50, 100)
    assert small.media == (tmp_path / "small.png").read_bytes()

    convert(found, tmp_path / "quality", Settings("test", reencoding=Reencoding(quality=30)))
    for one, size in zip(iterate_samples(SourceConfig.at(tmp_path / "quality")), [(200, 400), (80, 60)], strict=True):
        picture = Image.open(io.BytesIO(one.media))
        assert (picture.format, picture.size, one.media_type) == ("JPEG", size, "jpg")


@pytest.mark.parametrize(("settings", "message"), [({"max_side": -1}, "--max-side"), ({"quality": 101}, "--quality")])
def test_bad_reencodings(settings, message):
    with pytest.raises(DataError, match=message):
        Reencoding(**settings)


def test_media_inside_of_other_files(tmp_path):
    data = photo(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "large.bin").write_bytes(b"before" + data + b"after")
    found = [Record("a", "image", Stored(tmp_path / "large.bin", 6, len(data), "a.jpg"), ["a photo"])]
    convert(found, tmp_path / "out", Settings("test"))
    (sample,) = iterate_samples(SourceConfig.at(tmp_path / "out"))
    assert sample.media == data


def test_a_launcher_that_is_not_of_mpi_is_refused(monkeypatch):
    """Under srun each process would do the whole work."""
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="the launcher started 4 processes, but MPI knows of 1: use the mpirun"):
        Hosts()
