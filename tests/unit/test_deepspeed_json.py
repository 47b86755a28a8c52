"""DeepSpeed JSONs: what DeepSpeed would ignore or we cannot honour is refused; our key lists are DeepSpeed's own."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

from dsmoe_vl.config.deepspeed_json import check_deepspeed, load_deepspeed, setting
from dsmoe_vl.config.deepspeed_keys import REMOVED, SCHEDULERS, SECTIONS, TOP_LEVEL
from dsmoe_vl.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
GOOD = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


def changed(**sections):
    config = copy.deepcopy(GOOD)
    config.update(sections)
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    config = load_deepspeed(path)
    assert config["optimizer"]["params"]["lr"] > 0
    assert "train_batch_size" not in config  # it would tie the file to one world size


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed(zero_optimisation={"stage": 2}), ["zero_optimisation", "ds.json", '"zero_optimization"']),
        (changed(gradient_cliping=1.0), ['"gradient_clipping"']),
        (changed(zero_optimization={"stge": 2}), ["stge", "zero_optimization", '"stage"']),
        (changed(zero_optimization={"stage": 1, "offload_optimizer": {"devcie": "cpu"}}), ['"device"']),
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "beta": [0.9, 0.99]}}), ['"betas"']),
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "max_grad_norm": 1}}), ["gradient_clipping"]),
        (changed(optimizer={"type": "Lion", "params": {"lr": 1e-3}}), ["Lion", "AdamW"]),
        (changed(optimizer={"type": "AdamW", "params": {}}), ["optimizer.params.lr"]),
        (changed(optimizer={"type": "AdamW", "params": {"lr": "1e-3"}}), ["optimizer.params.lr", "a number"]),
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9]}}), ["betas"]),
        (changed(scheduler={"type": "WarmupCosine"}), ["WarmupCosine", '"WarmupCosineLR"']),
        (changed(scheduler={"type": "WarmupLR", "params": {"total_num_steps": 3}}), ["total_num_steps", "WarmupLR"]),
        (
            changed(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 0}}),
            ["warmup_num_steps", "at least 1"],
        ),
        (changed(scheduler={"type": "WarmupLR", "params": 3}), ["scheduler.params"]),
        (changed(bf16={"enable": True}), ['"enabled"']),
        (changed(bf16={"enabled": 1}), ["bf16.enabled", "true or false"]),
        (changed(bf16=True), ["bf16", "section"]),
        (changed(fp16={"enabled": True}), ["fp16", "bf16"]),
        (changed(expert_parallel={"enabled": True, "ep_size": 2}), ['"autoep_size"']),
        (changed(expert_parallel={"enabled": True, "autoep_size": 0}), ["autoep_size", "at least 1"]),
        (changed(expert_parallel={"enabled": True, "load_balance_coeff": 0.01}), ["moe.balance_weight"]),
        (changed(expert_parallel={"enabled": True, "preset_model": "mixtral"}), ["preset_model", "not supported"]),
        (changed(tensorboard={"enabled": True, "output_dir": "x"}), ['"output_path"']),
        (changed(activation_checkpointing={"partition_activation": True}), ['"partition_activations"']),
        (changed(activation_checkpointing={"cpu_checkpointing": True}), ["not supported"]),
        (changed(train_micro_batch_size_per_gpu="auto"), ["auto", "train_micro_batch_size_per_gpu"]),
        (
            changed(zero_optimization={"stage": 3, "reduce_bucket_size": "auto"}),
            ["zero_optimization.reduce_bucket_size"],
        ),
        (changed(train_micro_batch_size_per_gpu=2.0), ["train_micro_batch_size_per_gpu", "whole number"]),
        (changed(elasticity={"enabled": False}), ["elasticity", "Remove"]),
        (changed(pipeline={"stages": 2}), ["pipeline", "not supported"]),
        (changed(tensor_parallel={"autotp_size": 2}), ["tensor_parallel", "not supported"]),
        (changed(gradient_allreduce_op="sum"), ["gradient_allreduce_op", '"mean"']),
        (changed(zero_optimization={"stage": 2, "reduce_scatter": False}), ["reduce_scatter", "true"]),
        (changed(zero_optimization={"stage": 4}), ["zero_optimization.stage = 4"]),
        (changed(zero_optimization={"stage": True}), ["zero_optimization.stage"]),
        (changed(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}), ["at least 3"]),
        (changed(zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}), ["nvme", '"cpu"']),
        (changed(zero_optimization={"stage": 2, "cpu_offload": True}), ["offload_optimizer"]),
        (changed(gradient_clipping=-1), ["gradient_clipping"]),
    ],
)
def test_bad_setting_is_named(config, expected):
    with pytest.raises(ConfigError) as raised:
        check_deepspeed(config, "ds.json")
    for part in ["ds.json", *expected]:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "eps": "1e-8"}}), ["eps", "write 1e-8 without"]),
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "eps": 0}}), ["eps = 0", "above 0"]),
        (changed(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": "0.9, 0.95"}}), ["betas", "a list"]),
        (changed(optimizer={"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False}}), ["adam_w_mode", "true"]),
        (changed(optimizer={"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}), ["torch_adam", "Remove"]),
        (changed(wall_clock_breakdown="true"), ["wall_clock_breakdown", "write true without quotes"]),
        (changed(steps_per_print="10"), ["steps_per_print", "write 10 without quotes"]),
        (changed(flops_profiler={"enabeld": True}), ["enabeld", "flops_profiler", '"enabled"']),
        (changed(flops_profiler={"enabled": True, "profile_step": 1.5}), ["profile_step", "a whole number"]),
        (changed(comms_logger={"enabled": True, "prof_ops": "all_reduce"}), ["prof_ops", "a list"]),
        (changed(timers={"throughput": {"enabeld": False}}), ["enabeld", "timers.throughput"]),
        (changed(timers={"throughput": False}), ["timers.throughput", "a section"]),
        (changed(checkpoint={"tag_validate": "Fail"}), ['"tag_validation"']),
        (changed(data_types={"grad_acum_dtype": "fp32"}), ['"grad_accum_dtype"']),
        (
            changed(zero_optimization={"stage": 2, "reduce_bucket_size": "5e8"}),
            ["without quotes"],
        ),
        (changed(zero_optimization={"stage": "2"}), ["zero_optimization.stage"]),
        (changed(zero_optimization={"stage": 2, "overlap_comm": "yes"}), ["overlap_comm", "true or false"]),
        (
            changed(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": "3e-4"}}),
            ["3e-4 without"],
        ),
        (changed(gradient_clipping="auto"), ['"auto"', "such as 1.0"]),
        (
            changed(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}),
            ["total_num_steps", "filled in from run.steps"],
        ),
    ],
)
def test_nested_keys_and_types_are_checked(config, expected):
    with pytest.raises(ConfigError) as raised:
        check_deepspeed(config, "ds.json")
    for part in ["ds.json", *expected]:
        assert part in str(raised.value)


def test_all_problems_of_a_hugging_face_configuration_at_once():
    config = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    with pytest.raises(ConfigError) as raised:
        check_deepspeed(config, "hf.json")
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{len(lines) - 1} problems in hf.json:" and len(set(lines)) == len(lines)
    autos = [line for line in lines if '= "auto"' in line]
    assert len(autos) == 16 and not [line for line in autos if "Write the value itself" in line]


def test_switched_off_features_pass():
    off = changed(
        fp16={"enabled": False},
        wandb={"enabled": False},
        hybrid_engine={"enabled": False},
        dataloader_drop_last=False,
        sequence_parallel_size=1,
        gradient_allreduce_op="mean",
        zero_optimization={"stage": 2, "zero_hpz_partition_size": 1, "zero_quantized_gradients": False},
        expert_parallel={"enabled": True, "autoep_size": 2, "load_balance_coeff": None},
        activation_checkpointing={"partition_activations": False},
    )
    check_deepspeed(off, "ds.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  // a comment\n  "bf16": {}\n}', ["line 2", "comments are not JSON", "// a comment"]),
        ('{\n  "bf16": {} # why\n}', ["line 2", "comments are not JSON"]),
        ('{\n  "bf16": {},\n}', ["line 3"]),
        ('{"bf16": {}', ["line 1"]),
        ("", ["line 1"]),
        ("[]", ["one object"]),
        ('{"bf16": {}, "bf16": {}}', ["bf16", "twice"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
    ],
)
def test_broken_json_names_the_line(tmp_path, text, expected):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_deepspeed(path)
    for part in [str(path), *expected]:
        assert part in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_deepspeed(tmp_path / "absent.json")


def test_setting_reads_dotted_paths():
    config = {"a": {"b": 0, "c": None}, "d": 3}
    assert setting(config, "a.b", 7) == 0
    assert setting(config, "a.c", 7) == setting(config, "a.x.y", 7) == setting(config, "d.e", 7) == 7


# The lists against the source of the installed DeepSpeed, which is read and not imported.


def source(name: str) -> str:
    root = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
    return (Path(root) / name).read_text()


def fields(name: str, classname: str) -> set[str]:
    """Field names and aliases of a pydantic class."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.ClassDef) and node.name == classname:
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    found.add(item.target.id)
                    found |= {
                        word.value.value
                        for word in getattr(item.value, "keywords", [])
                        if word.arg == "alias" and isinstance(word.value, ast.Constant)
                    }
    return found


@pytest.mark.parametrize(
    ("section", "file", "classname"),
    [
        ("zero_optimization", "runtime/zero/config.py", "DeepSpeedZeroConfig"),
        (
            "zero_optimization.offload_optimizer",
            "runtime/zero/offload_config.py",
            "DeepSpeedZeroOffloadOptimizerConfig",
        ),
        ("zero_optimization.offload_param", "runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
        ("bf16", "runtime/precision_config.py", "DeepSpeedBF16Config"),
        ("fp16", "runtime/precision_config.py", "DeepSpeedFP16Config"),
        ("tensorboard", "monitor/config.py", "TensorBoardConfig"),
        ("comms_logger", "comm/config.py", "CommsLoggerConfig"),
        ("timers.throughput", "utils/config.py", "DeepSpeedThroughputTimerConfig"),
    ],
)
def test_sections_are_deepspeeds(section, file, classname):
    assert set(SECTIONS[section]) == fields(file, classname)


def test_expert_parallel_keys_are_deepspeeds():
    text = source("module_inject/auto_ep_config.py")
    assert set(SECTIONS["expert_parallel"]) == set(re.findall(r'param_dict(?:\.get\(|\[)"(\w+)"', text))


def test_flops_profiler_and_checkpoint_keys_are_deepspeeds():
    text = source("profiling/constants.py")
    named = set(re.findall(r'^FLOPS_PROFILER_[A-Z_]+ = "(\w+)"', text, flags=re.MULTILINE))
    assert set(SECTIONS["flops_profiler"]) == named
    text = source("runtime/model_checkpointing/constants.py") + source("runtime/constants.py")
    for section in ("checkpoint", "checkpoint.writer", "checkpoint.parallel_write", "data_types"):
        assert [key for key in SECTIONS[section] if f'"{key}"' not in text] == [], section


@pytest.mark.parametrize(
    ("section", "module", "name"),
    [
        ("zero_optimization", "deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
        (
            "zero_optimization.offload_optimizer",
            "deepspeed.runtime.zero.offload_config",
            "DeepSpeedZeroOffloadOptimizerConfig",
        ),
        ("zero_optimization.offload_param", "deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
        ("bf16", "deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
        ("tensorboard", "deepspeed.monitor.config", "TensorBoardConfig"),
        ("comms_logger", "deepspeed.comm.config", "CommsLoggerConfig"),
        ("timers.throughput", "deepspeed.utils.config", "DeepSpeedThroughputTimerConfig"),
    ],
)
def test_kinds_are_those_of_deepspeeds_models(section, module, name):
    """Of every key of a section that DeepSpeed describes by a model with types."""
    kinds = {bool: "flag", int: "integer", float: "number", str: "string", list: "list"}
    for key, field in getattr(importlib.import_module(module), name).model_fields.items():
        arguments = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
        if arguments[0] in kinds:
            assert SECTIONS[section][key] == kinds[arguments[0]], key


def test_activation_checkpointing_keys_are_deepspeeds():
    text = source("runtime/activation_checkpointing/config.py")
    named = set(re.findall(r"^ACT_CHKPT_\w+ = '(\w+)'", text, flags=re.MULTILINE))
    assert set(SECTIONS["activation_checkpointing"]) == named


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_keys_are_deepspeeds(scheduler):
    tree = ast.parse(source("runtime/lr_schedules.py"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == scheduler)
    (constructor,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert SCHEDULERS[scheduler] == {argument.arg for argument in constructor.args.args} - {"self", "optimizer"}


def test_top_level_keys_are_deepspeeds():
    """Every scalar that its config class reads is in our list, and every name of our list is in its source."""
    config = source("runtime/config.py")
    constants = dict(re.findall(r"^([A-Z0-9_]+) = [\"'](\w+)[\"']", source("runtime/constants.py"), flags=re.MULTILINE))
    read = {constants[name] for name in re.findall(r"get_scalar_param\(\s*param_dict, ([A-Z0-9_]+),", config)}
    assert len(read) > 15 and read <= set(TOP_LEVEL)
    files = """
        runtime/config.py runtime/constants.py runtime/precision_config.py runtime/zero/config.py
        runtime/activation_checkpointing/config.py runtime/swap_tensor/constants.py comm/constants.py utils/config.py
        runtime/data_pipeline/constants.py autotuning/constants.py profiling/constants.py monitor/config.py
        datastates/config.py runtime/tensor_parallel/init_utils.py __init__.py
        """
    text = "".join(source(name) for name in files.split())
    assert {name for name in TOP_LEVEL if not re.search(rf"[\"']{name}[\"']", text)} == set()


def test_removed_keys_are_deepspeeds():
    (table,) = (
        node.value
        for node in ast.parse(source("runtime/config.py")).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_REMOVED_TOP_LEVEL_CONFIG_KEYS"
    )
    assert {key.value for key in table.keys} == REMOVED
