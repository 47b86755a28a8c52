"""The proximal step against a loop over every weight; the recipe's keys of the L1 term."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import L1Config
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.optim.l1 import add_proximal_step
from dsmoe_vl.planner.describe import describe
from tests.distributed.ranks import cpu_environment
from tests.unit.test_resolve import moe, plan, quickstart

L1 = L1Config(weight=0.4, experts=1.0, matrices=0.5, vectors=0.0)


def fused(groups, _monkeypatch):
    return torch.optim.AdamW(groups, fused=True, betas=(0.9, 0.95), weight_decay=0.1)


def on_cpu(groups, monkeypatch):
    """The optimizer of a run with offload. Compiling it takes minutes, so only where such a run has done it."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path(sys.prefix, "torch_extensions")))
    if not (folder / "cpu_adam" / "cpu_adam.so").exists():
        pytest.skip(f"no cpu_adam in {folder}: the proximal step with offload was not checked")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("PATH", cpu_environment()["PATH"])  # ninja
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, betas=(0.9, 0.95), weight_decay=0.1)


def groups():
    """As the engine leaves them: one flat shard each, the experts' under the name of their process group."""
    generator = torch.Generator().manual_seed(0)
    names = ({"name": "matrices"}, {"name": "vectors"}, {"name": "ep_size_2", "moe": True})
    shards = [torch.nn.Parameter(0.02 * torch.randn(101, generator=generator)) for _ in names]
    return [{**name, "params": [shard], "lr": 1e-2} for name, shard in zip(names, shards, strict=True)]


def train(optimizer, steps, after=lambda optimizer: None):
    """Random gradients, a falling learning rate, one group at a time as ZeRO does it."""
    generator = torch.Generator().manual_seed(1)
    together = optimizer.param_groups
    for step in range(steps):
        for group in together:
            group["lr"] = 1e-2 / (1 + step)
            group["params"][0].grad = torch.randn(101, generator=generator)
            optimizer.param_groups = [group]
            optimizer.step()
            after(optimizer)
        optimizer.param_groups = together
    return [group["params"][0].detach().numpy().copy() for group in together]


def naive(optimizer):
    """The same step by a loop, in fp32."""
    for group in optimizer.param_groups:
        coefficient = {"ep_size_2": 1.0, "matrices": 0.5, "vectors": 0.0}[group["name"]]
        threshold = np.float32(group["lr"] * 0.4 * coefficient)
        values = group["params"][0].detach().numpy()
        for i, value in enumerate(values):
            values[i] = np.sign(value) * max(abs(value) - threshold, np.float32(0))


@pytest.mark.parametrize("build", [fused, on_cpu])
def test_proximal_step_equals_a_loop(build, monkeypatch):
    optimizer, reference = (build(groups(), monkeypatch) for _ in range(2))
    add_proximal_step(optimizer, L1)
    ours, theirs = train(optimizer, 8), train(reference, 8, naive)
    for shard, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(shard, expected)
    zeros = [int((shard == 0).sum()) for shard in ours]
    assert zeros[0] > 5 and zeros[1] == 0 and zeros[2] > 5


def test_a_resumed_optimizer_shrinks_as_its_own_recipe_says(monkeypatch):
    saved, resumed, reference = (fused(groups(), monkeypatch) for _ in range(3))
    add_proximal_step(saved, L1Config(weight=9.0))
    add_proximal_step(resumed, L1)
    train(saved, 2)
    for optimizer in (resumed, reference):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))  # tensors would be shared
    for shard, expected in zip(train(resumed, 3), train(reference, 3, naive), strict=True):
        np.testing.assert_array_equal(shard, expected)


def test_no_term_no_cost(monkeypatch):
    optimizer = fused(groups(), monkeypatch)
    add_proximal_step(optimizer, L1Config(weight=0.0))
    assert not optimizer._optimizer_step_post_hooks


def test_dry_run_shows_the_term():
    term = "0.1 x (1 |experts| + 0.5 |other matrices| + 0 |norms, biases|)"
    assert term in describe(plan(quickstart("objective.l1.weight=0.1", "objective.l1.matrices=0.5")))
    assert "L1" not in describe(plan())


@pytest.mark.parametrize("key", ["weight", "experts", "matrices", "vectors"])
def test_no_coefficient_is_negative(key):
    with pytest.raises(ConfigError, match=rf"objective\.l1\.{key} = -0\.5 in my\.toml: must not be negative"):
        plan(quickstart(f"objective.l1.{key}=-0.5"))


@pytest.mark.parametrize(("key", "value", "shown"), [("ratio", 0.5, "0.5"), ("super_offload", True, "true")])
def test_weights_that_another_optimizer_updates_are_refused(key, value, shown):
    config = moe(zero_optimization={"stage": 3, "offload_optimizer": {"device": "cpu", key: value}})
    with pytest.raises(ConfigError, match=rf"offload_optimizer\.{key} = {shown} in my\.json: objective\.l1\.weight"):
        plan(quickstart("objective.l1.weight=0.1"), config)
    plan(config=config)
