"""Recipe + DeepSpeed JSON + world size -> run plan."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe, recipe_from_table
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.describe import describe
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve

ROOT = Path(__file__).parents[2]
RECIPES, CONFIGS = ROOT / "launch" / "recipes", ROOT / "ds_configs"


BUDGETS = (  # fixed here, so that tuning the quickstart changes no message
    "data.pack_length=512",
    "data.pack_patches=1024",
    "data.image_max_patches=256",
    "data.frame_max_patches=64",
    "data.video_frames=8",
    "data.frame_pool=2",
    "model.vision.ffn_width=512",
    "run.steps=300",
    "train.*.lr_scale=1",  # as some schedules need it
    "train.embedding.lr_scale=1",
)


def quickstart(*overrides: str) -> Recipe:
    return load_recipe(RECIPES / "quickstart.toml", [*BUDGETS, *overrides])


def moe(**sections) -> dict:
    config = load_deepspeed(CONFIGS / "moe.json")
    for key, value in sections.items():
        config[key] = value
    return config


def plan(
    recipe: Recipe | None = None, config: dict | None = None, world_size: int = 2, device: str = "cuda", **settings
) -> RunPlan:
    settings = {"bf16_unit": True, "recipe_file": "my.toml", "deepspeed_file": "my.json", **settings}
    return resolve(recipe or quickstart(), config or moe(), world_size, device=device, **settings)


def test_plan_of_the_quickstart_on_two_ranks():
    found = plan(world_size=2)
    assert (found.world_size, found.dp_size, found.ep_size, found.zero_stage) == (2, 2, 2, 2)
    assert found.precision == "bf16"
    assert found.packs_per_step == found.micro_batch * found.accumulation * 2
    assert found.tokens_per_step == found.packs_per_step * found.recipe.data.pack_length
    assert found.run_dir == Path("runs/quickstart")
    assert found.tensorboard_enabled and found.tensorboard_dir == Path("runs/quickstart/tensorboard")
    assert found.recompute == "none"
    assert found.notes == ()


def test_engine_config_is_complete_and_the_input_untouched():
    config = moe(train_micro_batch_size_per_gpu=3, gradient_accumulation_steps=2)
    before = copy.deepcopy(config)
    found = plan(config=config, world_size=4)
    assert config == before
    assert "expert_parallel" not in found.deepspeed and "tensorboard" not in found.deepspeed
    assert found.deepspeed["train_batch_size"] == 24
    assert found.deepspeed["train_micro_batch_size_per_gpu"] == 3
    assert found.deepspeed["gradient_accumulation_steps"] == 2
    for key in ("gradient_clipping", "optimizer", "zero_optimization", "bf16"):
        assert found.deepspeed[key] == config[key]


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "expected"),
    [
        (None, 3, None, (12, 3, 1)),
        (None, 3, 2, (24, 3, 2)),
        (24, None, None, (24, 6, 1)),
        (24, 3, None, (24, 3, 2)),
        (24, None, 2, (24, 3, 2)),
        (24, 3, 2, (24, 3, 2)),
    ],
)
def test_batch_sizes_complete_each_other(train, micro, accumulation, expected):
    found = plan(config=batch(train, micro, accumulation), world_size=4)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(found.deepspeed[key] for key in keys) == expected
    assert (found.micro_batch, found.accumulation) == expected[1:]


def batch(train, micro, accumulation) -> dict:
    return moe(train_batch_size=train, train_micro_batch_size_per_gpu=micro, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize(
    "sizes",
    [(None, None, None), (None, None, 4), (24, 3, 3), (25, 3, None), (25, None, 2), (2, None, None), (2, 3, None)],
)
def test_batch_sizes_that_disagree(sizes):
    with pytest.raises(ConfigError, match=r"my\.json"):
        plan(config=batch(*sizes), world_size=4)


@pytest.mark.parametrize(
    ("asked", "world_size", "expected"), [(2, 1, 1), (2, 2, 2), (2, 8, 2), (8, 8, 8), (8, 4, 4), (3, 8, 2), (16, 8, 8)]
)
def test_expert_parallel_size_fits_ranks_and_experts(asked, world_size, expected):
    config = moe(expert_parallel={"enabled": True, "autoep_size": asked})
    found = plan(config=config, world_size=world_size)
    assert found.ep_size == expected
    assert bool(found.notes) == (asked != expected)
    if asked != expected:
        assert f"autoep_size = {asked}" in found.notes[0] and f"using {expected}" in found.notes[0]
        with pytest.raises(ConfigError, match=rf"autoep_size = {asked} in my\.json.*Set it to {expected}"):
            plan(config=config, world_size=world_size, strict=True)


def test_expert_parallel_size_divides_the_experts():
    config = moe(expert_parallel={"enabled": True, "autoep_size": 4})
    found = plan(quickstart("moe.experts=6"), config, world_size=4)
    assert found.ep_size == 2 and "moe.experts = 6" in found.notes[0]


@pytest.mark.parametrize("section", [{}, {"enabled": False, "autoep_size": 2}, {"autoep_size": 2}])
def test_expert_parallel_off(section):
    assert plan(config=moe(expert_parallel=section)).ep_size == 1


def test_groups_cover_every_rank_once():
    found = plan(world_size=8)
    assert [list(group) for group in found.ep_groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(group) for group in found.expert_data_groups] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_bf16_without_a_unit_becomes_fp32():
    found = plan(device="cpu", bf16_unit=False)
    assert found.precision == "fp32" and found.deepspeed["bf16"] == {"enabled": False}
    assert "bf16" in found.notes[0] and "my.json" in found.notes[0]
    with pytest.raises(ConfigError, match=r"Set bf16\.enabled to false"):
        plan(device="cpu", bf16_unit=False, strict=True)


def test_precision_as_asked_for():
    assert plan(device="cpu", bf16_unit=True).precision == "bf16"
    assert plan(config=moe(bf16={"enabled": False})).precision == "fp32"


def scheduler(kind: str, **params) -> dict:
    return moe(scheduler={"type": kind, "params": params})


@pytest.mark.parametrize("kind", ["WarmupCosineLR", "WarmupDecayLR"])
def test_schedule_ends_with_the_run(kind):
    found = plan(quickstart("run.steps=77"), scheduler(kind, warmup_num_steps=5))
    assert found.deepspeed["scheduler"]["params"]["total_num_steps"] == 77
    assert found.notes == ()


def test_schedule_of_another_length_is_noted():
    config = scheduler("WarmupCosineLR", warmup_num_steps=5, total_num_steps=900)
    found = plan(config=config)
    assert found.deepspeed["scheduler"]["params"]["total_num_steps"] == 900
    assert "total_num_steps = 900" in found.notes[0]
    with pytest.raises(ConfigError, match="Remove total_num_steps"):
        plan(config=config, strict=True)


def test_warmup_longer_than_the_run_is_noted():
    found = plan(quickstart("run.steps=10"), scheduler("WarmupCosineLR", warmup_num_steps=50))
    assert "warmup_num_steps = 50" in found.notes[0]
    assert "warmup_num_steps = 1000" in plan(config=scheduler("WarmupCosineLR")).notes[0]  # DeepSpeed's default


def test_decay_peaks_at_the_optimizers_learning_rate():
    found = plan(config=scheduler("WarmupDecayLR", warmup_num_steps=5))
    assert found.deepspeed["scheduler"]["params"]["warmup_max_lr"] == found.deepspeed["optimizer"]["params"]["lr"]


def test_schedules_keep_rates_by_part_or_are_refused():
    recipe = quickstart("train.vision.lr_scale=0.1", "train.heads.lr_scale=2")
    params = {"lr": 2e-3}
    shown = describe(plan(recipe, moe(optimizer={"type": "AdamW", "params": params})))
    assert "0.002 at its peak" in shown and re.search(r"vision +[\d.]+ \w, rate 0\.0002\n", shown)
    plan(recipe, scheduler("WarmupLR"))
    wrong = scheduler("WarmupDecayLR"), scheduler("LRRangeTest"), scheduler("WarmupLR", warmup_max_lr=1e-3)
    for config in wrong:
        plan(config=config)
        message = r'^train\.vision\.lr_scale = 0\.1, .* in my\.toml: scheduler\.type = "\w+" in my\.json'
        with pytest.raises(ConfigError, match=message):
            plan(recipe, config)


def test_other_schedules_and_none():
    assert "total_num_steps" not in plan(config=scheduler("WarmupLR")).deepspeed["scheduler"]["params"]
    constant = moe()
    del constant["scheduler"]
    assert "constant" in describe(plan(config=constant))


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"enabled": True}, "runs/quickstart/tensorboard"),
        ({"enabled": True, "job_name": "mine"}, "runs/quickstart/mine"),
        ({"enabled": True, "output_path": "/logs"}, "/logs/quickstart"),
        ({"enabled": True, "output_path": "/logs", "job_name": "mine"}, "/logs/mine"),
    ],
)
def test_tensorboard_folder(section, expected):
    found = plan(config=moe(tensorboard=section))
    assert found.tensorboard_enabled and found.tensorboard_dir == Path(expected)


def test_tensorboard_is_off_by_default():
    config = moe()
    del config["tensorboard"]
    assert not plan(config=config).tensorboard_enabled


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["moe.top_k=9"], ["moe.top_k = 9", "moe.experts = 8"]),
        (["model.kv_heads=4"], ["model.kv_heads = 4", "model.heads = 6"]),
        (["model.width=190"], ["model.width = 190", "model.heads = 6"]),
        (["model.width=18"], ["model.heads = 6", "even"]),
        (["model.rope_sections=[6,5,6]"], ["model.rope_sections = (6, 5, 6)", "half of the head width, 16"]),
        (["model.rope_sections=[4,4,8]"], ["model.rope_sections = (4, 4, 8)", "of every three pairs at most one"]),
        (["model.vision.taps=[1,0]"], ["model.vision.taps = (1, 0)", "in order, from 0 to"]),
        (["model.vision.taps=[99]"], ["model.vision.taps = (99,)", "in order, from 0 to"]),
        (["model.vision.width=120"], ["model.vision.width = 120", "16"]),
        (["model.layers=0"], ["model.layers = 0", "at least 1"]),
        (["moe.first_dense_layers=5"], ["moe.first_dense_layers = 5", "model.layers = 4"]),
        (["moe.balance_weight=-0.1"], ["moe.balance_weight = -0.1", "negative"]),
        (["data.pack_patches=1022"], ["data.pack_patches = 1022", "merge", "1024"]),
        (["data.image_max_patches=2"], ["data.image_max_patches = 2", "4"]),
        (["data.image_max_patches=2048"], ["data.image_max_patches = 2048", "data.pack_patches = 1024"]),
        (["data.pack_length=64"], ["data.image_max_patches = 256", "64 tokens"]),
        (["data.video_frames=17"], ["data.frame_max_patches = 64", "1088", "1024"]),
        (["data.pack_length=65", "data.frame_pool=1", "data.video_frames=5"], ["data.video_frames = 5", "80 tokens"]),
        (["data.lanes=9"], ["data.lanes = 9", "2 ranks x 1 workers"]),
        (["data.workers=3"], ["data.lanes = 8", "2 ranks x 3 workers = 6"]),
        (["data.max_bad_fraction=1.5"], ["data.max_bad_fraction = 1.5"]),
        (["data.sources=[]"], ["data.sources", "[[data.sources]]"]),
        (['data.sources=[{name="a"}]'], ["data.sources[0]", "path"]),
        (['data.sources=[{path="a"}]'], ["data.sources[0]", "name"]),
        (['data.sources=[{name="a",path="a"},{name="a",path="b"}]'], ["data.sources[1]", '"a"', "differ"]),
        (['data.sources=[{name="a",path="a",weight=0}]'], ["data.sources[0]", "weight = 0.0"]),
        (['data.evaluation=[{name="a"}]'], ["data.evaluation[0]", "path"]),
        (['data.sources=[{name="a",path="pipe:cat x/{}"}]'], ["data.sources[0]", "data.allow_pipe = true", '"a"']),
        (['data.evaluation=[{name="a",path="pipe:x"}]', "data.allow_pipe=true"], ["data.evaluation[0]", "{}", "file"]),
        (["data.cache_gib=-1"], ["data.cache_gib = -1", "negative"]),
        (["data.fetch_patience_seconds=0"], ["data.fetch_patience_seconds = 0", "above 0"]),
        (['data.cache=""'], ["data.cache = ''", "folder"]),
        (["run.stall_seconds=9"], ["run.stall_seconds = 9", "at least 10"]),
        (
            ['data.sources=[{name="a",path="https://host/a"}]', "data.fetch_patience_seconds=600"],
            ["run.stall_seconds = 600.0", "above data.fetch_patience_seconds = 600.0"],
        ),
        (["run.steps=0"], ["run.steps = 0", "at least 1"]),
        (["run.name=a/b"], ["run.name = 'a/b'", "one folder"]),
        (['run.name=""'], ["run.name = ''"]),
        (["tasks.caption.weight=0"], ["tasks.caption.weight = 0.0"]),
        (['tokenizer.path=""'], ["tokenizer.path", "tokenizer.model"]),
        (["tokenizer.vocab_size=0"], ["tokenizer.vocab_size = 0"]),
    ],
)
def test_recipe_that_cannot_be_trained_is_named(overrides, expected):
    with pytest.raises(ConfigError) as raised:
        plan(quickstart(*overrides))
    for part in ["my.toml", *expected]:
        assert part in str(raised.value)


def test_bad_world_size_and_bad_json():
    with pytest.raises(ConfigError, match="world size 0"):
        plan(world_size=0)
    with pytest.raises(ConfigError, match=r"my\.json"):
        plan(config=moe(gradient_cliping=1.0))


def test_evaluation_may_be_absent():
    assert plan(quickstart("data.evaluation=[]")).recipe.data.evaluation == ()


SHIPPED = [
    (recipe, config, world_size)
    for recipe, world_sizes in (("quickstart", (1, 2, 8)), ("base", (1, 8, 64, 256)), ("large", (1, 8, 64, 256)))
    for config in ("moe", "moe_zero3", "moe_offload")
    for world_size in world_sizes
]


@pytest.mark.parametrize(("recipe", "config", "world_size"), SHIPPED)
def test_shipped_files_plan_together(recipe, config, world_size):
    found = plan(load_recipe(RECIPES / f"{recipe}.toml"), load_deepspeed(CONFIGS / f"{config}.json"), world_size)
    text = describe(found)
    assert f"{found.tokens_per_step:,}" in text
    for note in found.notes:
        assert note in text
    assert max(len(line) for line in text.splitlines()) < 180


def test_file_names_default_to_what_they_are():
    with pytest.raises(ConfigError, match="the recipe"):
        resolve(recipe_from_table({}, "nowhere"), moe(), 1, device="cpu", bf16_unit=True)
    with pytest.raises(ConfigError, match="the DeepSpeed JSON"):
        resolve(quickstart(), {}, 1, device="cpu", bf16_unit=True)


def test_zero_recomputation_flag():
    assert plan(config=moe(activation_checkpointing={})).recompute == "decoder"
    for wanted, said in (("none", True), ("moe", True), ("decoder", False), ("all", False)):
        recipe = replace(quickstart(), run=replace(quickstart().run, recompute=wanted))
        found = plan(recipe, config=moe(activation_checkpointing={}))
        assert found.recompute == wanted and any("run.recompute" in note for note in found.notes) == said


def test_large_recipe_has_the_size_it_says():
    found = plan(load_recipe(RECIPES / "large.toml"), world_size=64).parameters
    assert 28e9 < found.total < 31e9 and 2.7e9 < found.active < 3.3e9
    found = plan(load_recipe(RECIPES / "base.toml"), world_size=8).parameters
    assert 0.9e9 < found.total < 1.1e9
    found = plan(replace(quickstart()), world_size=8).parameters
    assert 5e6 < found.total < 10e6
