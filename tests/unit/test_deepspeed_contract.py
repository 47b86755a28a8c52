"""Every private name of DeepSpeed that we lean on, so that an upgrade that moves one says so here first."""

import dataclasses
import importlib
import inspect

import pytest

NAMES = [
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_layer", "AutoEPMoELayer"),
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_layer", "_AllToAllV"),
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_layer", "compute_split_plan"),
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_config", "AutoEPConfig"),
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_config", "MoELayerSpec"),
    ("moe/layer.py", "deepspeed.module_inject.auto_ep_folding", "mark_autoep_folding_router_parameter"),
    ("optim/adamw.py", "deepspeed.moe.utils", "split_params_into_different_moe_groups_for_optimizer"),
    ("parallel/launch.py", "deepspeed.ops.op_builder.cpu.comm", "ShareMemCommBuilder"),
    ("checkpoint/weights.py", "deepspeed.runtime.zero", "GatheredParameters"),
]


@pytest.mark.parametrize(("user", "module", "name"), NAMES)
def test_name_exists(user, module, name):
    assert hasattr(importlib.import_module(module), name), f"{module}.{name} is gone, and dsmoe_vl/{user} leans on it"


def test_signatures_of_the_expert_parallel_layer():
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec

    layer = inspect.signature(auto_ep_layer.AutoEPMoELayer.__init__).parameters
    assert list(layer)[:6] == ["self", "spec", "source_module", "ep_size", "ep_rank", "config"]
    plan = inspect.signature(auto_ep_layer.compute_split_plan).parameters
    assert list(plan)[:6] == [
        "selected_experts", "num_experts", "ep_size", "num_local_experts", "ep_group", "num_tokens_per_expert",
    ]  # fmt: skip
    assert auto_ep_layer.SplitPlan._fields == ("input_splits", "output_splits", "local_counts_by_source")
    assert list(inspect.signature(auto_ep_layer._AllToAllV.forward).parameters)[1:] == [
        "group", "x", "input_splits", "output_splits",
    ]  # fmt: skip
    required = {f.name for f in dataclasses.fields(MoELayerSpec) if f.default is dataclasses.MISSING}
    assert {"expert_storage", "expert_w1_name", "num_experts", "top_k", "router_name"} <= required
    assert {"enabled", "autoep_size"} <= {f.name for f in dataclasses.fields(AutoEPConfig)}
