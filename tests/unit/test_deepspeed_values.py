"""Ranges and choices of DeepSpeed's values: ours are not wider than those of the installed DeepSpeed."""

from __future__ import annotations

import copy
import importlib
import inspect
import json

import annotated_types
import pytest

from dsmoe_vl.config.deepspeed_json import check_deepspeed, load_deepspeed
from dsmoe_vl.config.deepspeed_keys import NEEDED, SCHEDULERS, SECTIONS
from dsmoe_vl.config.deepspeed_values import AT, BF16, FP32, OF_SCHEDULE, wanted_at
from dsmoe_vl.errors import ConfigError

GOOD = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def with_value(path, value, config=GOOD):
    """`GOOD` with a value at a dotted path."""
    changed = copy.deepcopy(config)
    section = changed
    *sections, key = path.split(".")
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    return changed


def problem(config):
    """What is wrong with a configuration, "" if nothing is."""
    try:
        check_deepspeed(config, "ds.json")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("checkpoint.tag_validation", "Wrn", "one of: ignore, warn, fail"),
        ("checkpoint.writer.type", "fastt", "one of: mock, python, fast"),
        ("checkpoint.writer.data_parallel", "all", "one of: replica, socket, machine"),
        ("communication_data_type", "fp23", "one of: fp16, bf16, fp32"),
        ("seq_parallel_communication_data_type", "fp8", "one of: fp16"),
        ("data_types.grad_accum_dtype", "fp64", "one of: fp32, "),
        ("data_types.grad_accum_dtype", "fp16", "one of: fp32, "),
        ("data_types.grad_accum_dtype", "bf16", "needs bf16.enabled = true"),
        ("zero_optimization.reduce_bucket_size", 0, "at least 1"),
        ("zero_optimization.allgather_bucket_size", 0, "at least 1"),
        ("zero_optimization.stage3_prefetch_bucket_size", -1, "at least 0"),
        ("zero_optimization.prefetch_bucket_size", -1, "at least 0"),
        ("zero_optimization.offload_optimizer.ratio", 5, "from 0 to 1"),
        ("zero_optimization.offload_param.buffer_count", -1, "at least 0"),
        ("zero_optimization.leaf_module.clases", [], 'Did you mean "classes"?'),
        ("zero_optimization.leaf_module.classes", [3], "a list of strings"),
        ("log_level", "inf", "one of: debug, info"),
        ("steps_per_print", 0, "at least 1"),
        ("steps_per_print", -1, "at least 1"),
        ("gradient_predivide_factor", 0, "above 0"),
        ("aio.block_size", -1, "at least 1"),
        ("train_micro_batch_size_per_gpu", 10**30, "at most 1,000,000"),
        ("gradient_accumulation_steps", 10**400, "at most 1,000,000"),
        ("gradient_clipping", 10**400, "a number of at least 0"),
        ("optimizer.params.lr", 10**400, "a number"),
        ("vocabulary_size", 1e300, "a whole number"),
        ("scheduler.type", ["WarmupLR"], 'scheduler.type = ["WarmupLR"] in ds.json must be a string'),
        ("scheduler.type", {"a": 1}, "must be a string"),
        ("scheduler.type", None, "null in ds.json is not a DeepSpeed scheduler"),
        ("optimizer.type", ["AdamW"], "must be one of: Adam, AdamW"),
    ],
)
def test_values_that_would_end_in_a_traceback(path, value, wanted):
    said = problem(with_value(path, value))
    assert path.rpartition(".")[2] in said and "ds.json" in said and wanted in said and len(said) < 350


@pytest.mark.parametrize(
    ("kind", "key", "value", "wanted"),
    [
        ("WarmupLR", "warmup_type", "lineer", "one of: log, linear"),
        ("WarmupCosineLR", "warmup_type", 3, "one of: log, linear"),
        ("WarmupCosineLR", "warmup_type", "Linear", "one of: log, linear"),  # DeepSpeed would take log
        ("WarmupCosineLR", "warmup_min_ratio", 5, "from 0 to 1"),
        ("WarmupCosineLR", "cos_min_ratio", [0.1], "from 0 to 1"),
        ("WarmupCosineLR", "cos_min_ratio", "0.1", "write 0.1 without quotes"),
        ("WarmupCosineLR", "warmup_num_steps", 1.5, "at least 1"),
        ("WarmupLR", "warmup_max_lr", -1, "at least 0"),
        ("WarmupLR", "last_batch_iteration", 7, "-1"),
        ("LRRangeTest", "lr_range_test_step_size", 0, "at least 1"),
        ("LRRangeTest", "lr_range_test_staircase", 1, "true or false"),
        ("OneCycle", "cycle_max_mom", 2, "from 0 to 1"),
        ("OneCycle", "cycle_first_step_size", 0, "at least 1"),
    ],
)
def test_values_of_schedules(kind, key, value, wanted):
    said = problem({**GOOD, "scheduler": {"type": kind, "params": {key: value}}})
    assert f"scheduler.params.{key} = {json.dumps(value)} in ds.json must be" in said and wanted in said


def test_a_schedule_that_lacks_a_rate():
    said = problem({**GOOD, "scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1e-3}}})
    assert "scheduler.params.cycle_min_lr is missing in ds.json" in said and "cycle_max_lr is" not in said
    assert not problem({**GOOD, "scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1, "cycle_min_lr": 0}}})


@pytest.mark.parametrize(
    "values",
    [
        {
            "checkpoint.tag_validation": "Warn",
            "checkpoint.writer.type": "Fast",
            "checkpoint.writer.data_parallel": None,
        },
        {"communication_data_type": "FP32", "log_level": "INFO", "steps_per_print": 10},
        {"zero_optimization.reduce_bucket_size": 5e8, "zero_optimization.stage3_prefetch_bucket_size": 0},
        {"zero_optimization.leaf_module": {"classes": "a.B", "names": ["c"]}, "gradient_predivide_factor": 0.5},
        {"zero_optimization.model_persistence_threshold": 2**63 - 1, "data_types.grad_accum_dtype": "fp32"},
        {"bf16.enabled": True, "data_types.grad_accum_dtype": "bf16"},
        {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp32", "zero_optimization.stage": 2},
    ],
)
def test_right_values_pass(values):
    config = GOOD
    for path, value in values.items():
        config = with_value(path, value, config)
    assert problem(config) == ""


def test_all_problems_at_once():
    config = with_value("steps_per_print", 0, with_value("log_level", "inf"))
    config["scheduler"] = {"type": ["WarmupLR"]}
    config["zero_optimization"] = {"reduce_bucket_size": 10**400}
    assert problem(config).startswith("4 problems in ds.json:")


@pytest.mark.parametrize(
    "deep", ['{"a":' * 5000 + "1" + "}" * 5000, '{"a": ' + "[" * 900 + "]" * 900 + "}"], ids=["objects", "lists"]
)
def test_a_file_that_is_nested_too_deeply(tmp_path, deep):
    (tmp_path / "ds.json").write_text(deep)
    with pytest.raises(ConfigError, match=r"ds\.json: more than 20 sections or lists within each other"):
        load_deepspeed(tmp_path / "ds.json")


def test_numbers_that_python_does_not_write():
    said = problem(with_value("zero_optimization.stage3_max_live_parameters", 10**5000))
    assert "stage3_max_live_parameters = a number of thousands of digits in ds.json must be" in said


def test_digits_that_python_does_not_read(tmp_path):
    for digits in (400, 5000):
        (tmp_path / "ds.json").write_text('{"train_batch_size": ' + "9" * digits + "}")
        with pytest.raises(ConfigError, match=r"ds\.json"):
            load_deepspeed(tmp_path / "ds.json")


# Against the installed DeepSpeed.

MODELS = {
    "zero_optimization": "runtime.zero.config:DeepSpeedZeroConfig",
    "zero_optimization.offload_optimizer": "runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.offload_param": "runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.leaf_module": "runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    "comet": "monitor.config:CometConfig",
}


def of_deepspeed(module, name):
    return getattr(importlib.import_module(f"deepspeed.{module}"), name)


def beyond(limit):
    """A value that a limit of pydantic refuses."""
    for kind, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
        if (bound := getattr(limit, kind, None)) is not None:
            return bound + step
    return None


@pytest.mark.parametrize("section", MODELS)
def test_ranges_are_deepspeeds(section):
    found = 0
    for name, field in of_deepspeed(*MODELS[section].split(":")).model_fields.items():
        limits = [limit for limit in field.metadata if isinstance(limit, annotated_types.BaseMetadata)]
        for key in {name, field.alias or name} & set(SECTIONS[section]):
            for value in filter(lambda value: value is not None, map(beyond, limits)):
                found += 1
                if f"{section}.{key}" != "zero_optimization.zero_hpz_partition_size":  # which is not supported
                    assert not wanted_at(f"{section}.{key}", SECTIONS[section][key]).fits(value), key
    assert found or section in ("comet", "zero_optimization.leaf_module")
    assert found > 10 or section != "zero_optimization"


def test_leaf_module_keys_are_deepspeeds():
    model = of_deepspeed(*MODELS["zero_optimization.leaf_module"].split(":"))
    assert set(SECTIONS["zero_optimization.leaf_module"]) == set(model.model_fields)


def choices(path):
    return set(AT[path].text.removeprefix("one of: ").split(", "))


def test_choices_are_deepspeeds():
    constants = importlib.import_module("deepspeed.runtime.model_checkpointing.constants")
    for path, known in (
        ("checkpoint.tag_validation", constants.CHECKPOINT_TAG_VALIDATION_MODES),
        ("checkpoint.writer.type", constants.CHECKPOINT_WRITER_TYPES),
        ("checkpoint.writer.data_parallel", constants.CHECKPOINT_DATA_PARALLEL_UNITS),
    ):
        assert choices(path) == {name.lower() for name in known}
    assert choices("log_level") == set(of_deepspeed("utils.logging", "log_levels"))
    read = of_deepspeed("runtime.config", "get_communication_data_type")
    assert all(read({"communication_data_type": name}) for name in choices("communication_data_type"))
    with pytest.raises(ValueError, match="'fp16', 'bf16', 'fp32'"):
        read({"communication_data_type": "fp23"})
    kinds = of_deepspeed("runtime.config", "DtypeEnum")
    for names, kind in ((FP32, kinds.fp32), (BF16, kinds.bf16)):
        assert set(names) == {name for name in kind._all_values if isinstance(name, str)}


def test_schedules_are_deepspeeds():
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    assert set(OF_SCHEDULE) == set().union(*SCHEDULERS.values())
    types = {schedules.WARMUP_LOG_RATE, schedules.WARMUP_LINEAR_RATE}
    assert set(OF_SCHEDULE["warmup_type"].text.removeprefix("one of: ").split(", ")) == types
    filled = {"optimizer", "self", "total_num_steps"}
    for kind in SCHEDULERS:
        parameters = inspect.signature(getattr(schedules, kind).__init__).parameters.values()
        needed = {one.name for one in parameters if one.default is inspect.Parameter.empty} - filled
        assert needed == set(NEEDED.get(kind, ()))
        for one in parameters:  # DeepSpeed's own defaults are right, None aside
            if one.default not in (inspect.Parameter.empty, None):
                assert OF_SCHEDULE[one.name].fits(one.default), one.name
