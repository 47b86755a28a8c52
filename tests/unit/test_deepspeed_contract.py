"""Every private name of DeepSpeed that we lean on, so that an upgrade that moves one says so here first."""

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys

import pytest

from tests.distributed.ranks import cpu_environment

NAMES = [
    ("moe/expert_parallel.py", "deepspeed.module_inject.auto_ep_layer", "AutoEPMoELayer"),
    ("moe/expert_parallel.py", "deepspeed.module_inject.auto_ep_config", "AutoEPConfig"),
    ("moe/expert_parallel.py", "deepspeed.module_inject.auto_ep_config", "MoELayerSpec"),
    ("moe/expert_parallel.py", "deepspeed.module_inject.auto_ep_folding", "mark_autoep_folding_router_parameter"),
    ("moe/expert_parallel_capacity.py", "deepspeed.moe.layer", "MoE"),
    ("moe/expert_parallel_capacity.py", "deepspeed.moe.sharded_moe", "TopKGate"),
    ("moe/expert_parallel_capacity.py", "deepspeed.moe.sharded_moe", "gumbel_rsample"),
    ("moe/expert_parallel_capacity.py", "deepspeed.moe.sharded_moe", "multiplicative_jitter"),
    ("moe/expert_parallel_capacity.py", "deepspeed.comm.pg_utils", "is_parallel"),
    ("optim/optimizer.py", "deepspeed.moe.utils", "split_params_into_different_moe_groups_for_optimizer"),
    ("optim/values.py", "deepspeed.utils", "safe_get_local_fp32_param"),
    ("parallel/process_group.py", "deepspeed.ops.op_builder.cpu.comm", "ShareMemCommBuilder"),
    ("checkpoint/weights.py", "deepspeed.runtime.zero", "GatheredParameters"),
]


@pytest.mark.parametrize(("user", "module", "name"), NAMES)
def test_name_exists(user, module, name):
    assert hasattr(importlib.import_module(module), name), f"{module}.{name} is gone, and dsmoe_vl/{user} leans on it"


def test_attributes_that_the_l1_term_reads():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    fragments = importlib.import_module("deepspeed.utils.tensor_fragment")
    assert "self.basic_optimizer = basic_optimizer" in inspect.getsource(DeepSpeedEngine._configure_optimizer)
    assert "param.ds_zero_partition_rank" in inspect.getsource(Init._convert_to_deepspeed_param)
    assert "self._hp_mapping" in inspect.getsource(fragments.get_full_hp_param)
    assert hasattr(fragments.tensor_fragment, "get_hp_fragment")


def test_attributes_that_frozen_experts_need():
    """`training/engine.py: _without_expert_gradients` answers for the engine whether it has expert layers."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert "self.has_moe_layers = True" in inspect.getsource(DeepSpeedEngine._configure_distributed_model)
    assert "has_moe_layers=self.has_moe_layers" in inspect.getsource(DeepSpeedEngine._configure_zero_optimizer)
    assert "None of the param groups are marked as MoE" in inspect.getsource(
        DeepSpeedZeroOptimizer._configure_moe_settings
    )


def test_signatures_of_the_expert_parallel_layer():
    from deepspeed.module_inject import auto_ep_layer
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec

    layer = inspect.signature(auto_ep_layer.AutoEPMoELayer.__init__).parameters
    assert list(layer)[:6] == ["self", "spec", "source_module", "ep_size", "ep_rank", "config"]
    required = {f.name for f in dataclasses.fields(MoELayerSpec) if f.default is dataclasses.MISSING}
    assert {"expert_storage", "expert_w1_name", "num_experts", "top_k", "router_name"} <= required
    assert {"enabled", "autoep_size"} <= {f.name for f in dataclasses.fields(AutoEPConfig)}


def test_signatures_of_the_classic_layer():
    from deepspeed.moe import sharded_moe
    from deepspeed.moe.layer import MoE

    layer = inspect.signature(MoE.__init__).parameters
    assert list(layer)[:6] == ["self", "hidden_size", "expert", "num_experts", "ep_size", "k"]
    assert "use_residual" in layer
    gate = inspect.signature(sharded_moe.TopKGate.__init__).parameters
    assert list(gate)[:4] == ["self", "model_dim", "num_experts", "k"]
    for function, first in {
        sharded_moe.top1gating: ["logits", "capacity_factor", "min_capacity"],
        sharded_moe.top2gating: ["logits", "capacity_factor", "min_capacity"],
        sharded_moe.topkgating: ["logits", "k", "capacity_factor", "min_capacity"],
    }.items():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(first)] == first and "sparse_routes" in parameters
    assert "use_rts" in inspect.signature(sharded_moe.top1gating).parameters
    assert "top2_2nd_expert_sampling" in inspect.signature(sharded_moe.top2gating).parameters
    assert "drop_policy" in inspect.signature(sharded_moe.topkgating).parameters
    source = inspect.getsource(sharded_moe.MOELayer.forward)  # what the gate is given and must return
    assert "self.l_aux, C, E, indices_, locations_, gates_, self.exp_counts = self.gate(" in source
    assert "reshaped_input, input[1], True, self.use_tutel)" in source
    torch = importlib.import_module("torch")
    moe = MoE(4, torch.nn.Linear(4, 4), 2)
    marked = [name for name, parameter in moe.named_parameters() if getattr(parameter, "allreduce", True) is False]
    assert marked == [
        f"deepspeed_moe.experts.deepspeed_experts.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")
    ]


_TIMEOUTS = """
import json, deepspeed, torch
import torch.distributed as dist
from deepspeed.utils import groups
from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
start_process_group(Ranks(0, 1, 0), "cpu", stall_seconds=3000)
groups._create_expert_and_data_parallel(1)
made = {"world": dist.group.WORLD, "comm": deepspeed.comm.new_group([0]), "ours": dist.new_group(backend="gloo")}
made |= {f"experts {name}": group for name, group in groups._get_expert_parallel_group_dict().items()}
made |= {f"data {name}": group for name, group in groups._get_expert_data_parallel_group_dict().items()}
limits = {n: g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for n, g in made.items()}
print("limits", json.dumps(limits))
print("nccl", dist.distributed_c10d._get_default_timeout(dist.Backend.NCCL).total_seconds())
"""


def test_every_group_has_our_limit():
    """DeepSpeed makes its groups without a timeout; torch's own is half an hour."""
    done = subprocess.run(
        [sys.executable, "-c", _TIMEOUTS], env=cpu_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("limits", "nccl")))
    limits = json.loads(lines["limits"])
    assert len(limits) == 5 and set(limits.values()) == {6000.0} and float(lines["nccl"]) == 6000.0
