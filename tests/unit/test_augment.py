"""Augmented training pictures: what is chosen, what it does to pixels, where it is off; resuming."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest

from dsmoe_vl.config.checks import check_recipe
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import AugmentConfig, Recipe
from dsmoe_vl.data.augment import Augmentation
from dsmoe_vl.data.decode import decode_image, resized, sampled_frames, to_patches
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import changed_settings, plan_to_json, recipe_from_json
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.support.samples import sample
from tests.support.trained import random_run
from tests.unit.test_resolve import plan

ALL = AugmentConfig(zoom=0.3, shift=0.1, rotate=10.0, colour=0.2, erase=0.5, mirror=0.5)
OVERRIDES = [f"data.augment.{name}={value}" for name, value in asdict(ALL).items()]


def choices(config: AugmentConfig, count: int = 400) -> list[Augmentation]:
    return [Augmentation.choose(config, 1, "photos", "a", epoch) for epoch in range(count)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def recipe(tiny) -> Recipe:
    return load_recipe(tiny.recipe, OVERRIDES)


def test_off_is_the_same_picture():
    assert set(choices(AugmentConfig(), 20)) == {Augmentation()}
    for height, width in ((48, 64), (50, 30), (1, 1), (300, 7)):
        pixels = noise(height, width)
        np.testing.assert_array_equal(Augmentation().apply(pixels, 48, 64), resized(pixels, 48, 64))


def test_the_choice_is_a_function_of_seed_source_key_and_epoch():
    first = (ALL, 1, "photos", "a", 0)
    assert Augmentation.choose(*first) == Augmentation.choose(*first)
    for other in ((2, "photos", "a", 0), (1, "icons", "a", 0), (1, "photos", "b", 0), (1, "photos", "a", 1)):
        assert Augmentation.choose(ALL, *other) != Augmentation.choose(*first)
    assert len(set(choices(ALL))) == 400
    Augmentation.choose(ALL, 1, "photos", "a lone surrogate \udc80", 0)


def test_one_setting_does_not_change_what_another_does():
    for one, more in zip(choices(AugmentConfig(zoom=0.3)), choices(ALL), strict=True):
        assert one == Augmentation(scale=more.scale)


def test_choices_stay_in_their_bounds_and_fill_them():
    found = choices(ALL)
    sizes = np.array([math.sqrt(math.prod(one.scale)) for one in found])
    ratios = np.array([one.scale[1] / one.scale[0] for one in found])
    turns = np.array([math.degrees(one.radians) for one in found])
    for values, least, most in (
        (np.log(sizes), -math.log(1.3), math.log(1.3)),
        (np.log(ratios), -math.log(1.3) / 2, math.log(1.3) / 2),
        (turns, -10, 10),
        *((np.array([one.centre[axis] for one in found]), 0.4, 0.6) for axis in (0, 1)),
    ):
        assert least <= values.min() and values.max() <= most
        assert values.max() - values.min() > 0.97 * (most - least)
        assert abs(values.mean() - (least + most) / 2) < 0.1 * (most - least)
    assert 160 < sum(one.mirrored for one in found) < 240
    boxes = np.array([one.erased for one in found if one.erased])
    assert 160 < len(boxes) < 240 and boxes.min() >= 0 and boxes.max() <= 1
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert 0.02 <= areas.min() < 0.03 and 0.18 < areas.max() <= 0.2


def ramp(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A smooth picture of 96 x 128 pixels at any place, continued at its edges: [..., 3]."""
    y, x = rows.clip(0.5, 95.5), columns.clip(0.5, 127.5)
    return np.stack((20 + 2 * y, 230 - 1.5 * x, 20 + y + 0.8 * x), axis=-1)


@pytest.mark.parametrize(
    "view",
    [
        Augmentation(scale=(0.7, 0.8)),
        Augmentation(scale=(1.4, 1.25)),
        Augmentation(centre=(0.6, 0.35)),
        Augmentation(centre=(0.0, 1.0), scale=(1.3, 0.9)),
        Augmentation(radians=math.radians(12)),
        Augmentation(radians=math.radians(-90)),
        Augmentation(centre=(0.45, 0.6), scale=(0.8, 0.9), radians=-0.2, mirrored=True),
        Augmentation(centre=(0.6, 0.6), scale=(1.4, 1.3), radians=0.3),
    ],
)
def test_the_view_is_one_affine_map(view: Augmentation):
    """Each pixel of the result has the colour of its place in the picture."""
    rows, columns = np.mgrid[:96, :128] + 0.5
    found = view.apply(ramp(rows, columns).round().astype(np.uint8), 96, 128).astype(float)
    x, y = (128 - columns if view.mirrored else columns) - 64, rows - 48
    cos, sin = math.cos(view.radians), math.sin(view.radians)
    expected = ramp(
        96 * view.centre[0] + view.scale[0] * (cos * y - sin * x),
        128 * view.centre[1] + view.scale[1] * (cos * x + sin * y),
    )
    # The view's edges are rounded to pixels: half a pixel is a change of 1, and rounding of both sides comes to 2.
    assert np.abs(found - expected).max() < 3 and np.abs(found - expected).mean() < 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 2), (64, 64)])
def test_any_picture_has_the_asked_size(shape):
    extreme = AugmentConfig(zoom=1.0, shift=0.5, rotate=180.0, colour=0.9, erase=1.0, mirror=0.5)
    for one in choices(extreme, 30):
        for height, width in ((32, 48), (2, 1)):
            changed = one.apply(noise(*shape), height, width)
            assert changed.shape == (height, width, 3) and changed.dtype == np.uint8


def test_colours_keep_their_hue():
    pixels = noise(32, 32)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = (200, 30, 40), (90, 90, 90), (255, 255, 255)
    first, last = pixels.argmax(-1)[..., None], pixels.argmin(-1)[..., None]
    brightness = set()
    for one in choices(AugmentConfig(colour=0.4), 50):
        changed = one.apply(pixels, 32, 32).astype(int)
        assert (np.take_along_axis(changed, first, -1) == changed.max(-1, keepdims=True)).all()
        assert (np.take_along_axis(changed, last, -1) == changed.min(-1, keepdims=True)).all()
        red, green, blue = changed[0, 0]
        assert red > max(green, blue) + 25
        assert len(set(changed[0, 1])) == len(set(changed[0, 2])) == 1  # greys stay grey
        brightness.add(changed[0, 1, 0])
    assert min(brightness) < 70 and max(brightness) > 110


def test_an_erased_rectangle_has_the_mean_colour():
    pixels = noise(40, 80)
    before = pixels.copy()
    changed = Augmentation(erased=(0.25, 0.5, 0.5, 0.75)).apply(pixels, 40, 80)
    np.testing.assert_array_equal(pixels, before)
    assert np.abs(changed[20:30, 20:40] - pixels.mean((0, 1))).max() <= 1
    is_kept = np.ones((40, 80), bool)
    is_kept[20:30, 20:40] = False
    np.testing.assert_array_equal(changed[is_kept], pixels[is_kept])


def test_all_frames_of_a_video_change_alike_on_the_same_grid(recipe):
    vision, clip = recipe.model.vision, sample("video", epoch=3)
    reader, plain = MediaReader(recipe.data, vision, 7), MediaReader(recipe.data, vision)
    choice = Augmentation.choose(ALL, 7, clip.source.name, clip.key, 3)
    frames = list(sampled_frames(clip, recipe.data))
    for (_, frame), picture, same in zip(frames, reader.read(clip)[1], plain.read(clip)[1], strict=True):
        changed = choice.apply(frame, *(side * vision.patch_size for side in picture.grid))
        patches = to_patches(changed, picture.grid, vision.patch_size, vision.merge)
        np.testing.assert_array_equal(picture.patches, patches)
        assert (picture.patches != same.patches).any()
        assert picture.grid == same.grid and (picture.cell_token == same.cell_token).all()


def test_training_alone_sees_changed_pictures(tiny, recipe, tmp_path):
    photo, tokenizer = sample("image"), Tokenizer(tiny.data / "tokenizer.model")

    def patches(task: CaptionTask) -> np.ndarray:
        return task.prompt(photo).pictures[0].patches

    plain = patches(build_tasks(load_recipe(tiny.recipe), tokenizer)[0])
    image, vision = decode_image(photo.media), recipe.model.vision
    np.testing.assert_array_equal(plain, to_patches(image, (6, 6), vision.patch_size, vision.merge))
    assert (patches(build_tasks(recipe, tokenizer)[0]) != plain).any()
    np.testing.assert_array_equal(patches(build_tasks(recipe, tokenizer, training=False)[0]), plain)
    trained = load_run(random_run(tiny, tmp_path / "run", *OVERRIDES))
    assert trained.recipe.data.augment == ALL
    np.testing.assert_array_equal(patches(trained.task(CaptionTask)), plain)


def batches(tiny, recipe: Recipe, workers: int, states=None, skip: int = 0, take: int = 0):
    """Values of the batches of steps `skip` to `skip + take`, and the loader's state after them."""
    data = replace(recipe.data, workers=workers)
    encode = Encoder(build_tasks(recipe, Tokenizer(tiny.data / "tokenizer.model")))
    vision = recipe.model.vision
    loader = Loader(data, data.sources, encode, vision.patch_size, vision.merge, recipe.run.seed, 0, 1, 1, 2)
    if states:
        loader.load_state_dict(states)
    found = [vars(batch) for step in islice(loader, skip, skip + take) for batch in step]
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    return found, state


def test_a_resumed_run_sees_the_same_pictures(tiny, recipe):
    whole, _ = batches(tiny, recipe, 0, take=12)
    plain, _ = batches(tiny, load_recipe(tiny.recipe), 0, take=12)
    assert any((one["patches"] != other["patches"]).any() for one, other in zip(whole, plain, strict=True))
    for one, other in zip(whole, plain, strict=True):
        assert one["keys"] == other["keys"]  # packing is the same
    for before, after in ((0, 1), (1, 0)):
        first, state = batches(tiny, recipe, before, take=5)
        rest, _ = batches(tiny, recipe, after, [state], take=7)
        for one, other in zip(whole, first + rest, strict=True):
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_settings_are_checked_and_shown(tiny, recipe):
    assert load_recipe(tiny.recipe).data.augment == AugmentConfig()
    assert recipe.data.augment == ALL
    for override in ("zoom=-0.1", "zoom=1.5", "shift=0.6", "rotate=181", "colour=1", "erase=2", "mirror=-1"):
        with pytest.raises(ConfigError, match=rf"data\.augment\.{override.partition('=')[0]} = .*must"):
            check_recipe(load_recipe(tiny.recipe, [f"data.augment.{override}"]), 1, "tiny.toml")
    with pytest.raises(ConfigError, match=r'Did you mean "data\.augment\.colour"'):
        load_recipe(tiny.recipe, ["data.augment.color=0.1"])
    on = plan(replace(recipe, data=replace(recipe.data, augment=AugmentConfig(zoom=0.3, rotate=5.0))))
    assert "changed every epoch: zoom 0.3, rotate 5" in describe(on)
    assert "changed every epoch" not in describe(plan(load_recipe(tiny.recipe)))


def test_a_plan_from_before_there_was_augmentation_is_read(tmp_path, recipe):
    path, old = tmp_path / "plan.json", json.loads(plan_to_json(plan(recipe)))
    path.write_text(json.dumps(old))
    assert recipe_from_json(path) == recipe
    off = plan(replace(recipe, data=replace(recipe.data, augment=replace(ALL, erase=0.0))))
    assert changed_settings(off, path) == ["data.augment.erase 0.5 -> 0.0"]
    del old["recipe"]["data"]["augment"]
    path.write_text(json.dumps(old))
    assert recipe_from_json(path).data.augment == AugmentConfig()
    assert changed_settings(plan(recipe), path) == []
