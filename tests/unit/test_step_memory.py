"""What a micro-step keeps for its backward pass is gone when the next one begins."""

from __future__ import annotations

import weakref

import torch

from dsmoe_vl.doctor.calibration import small_plan
from dsmoe_vl.doctor.timed_step import on_ranks, random_batch
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.step import OptimizerStep

_SMALL = [
    "model.width=32", "model.heads=2", "model.kv_heads=1", "model.layers=2", "model.vision.layers=1",
    "moe.ffn_width=32", "data.pack_length=128", "data.pack_patches=256", "data.image_max_patches=64",
    "data.frame_max_patches=16",
]  # fmt: skip


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor):
        self.tensor = tensor


def _kept_at_each_forward(ranks, plan):
    engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))
    step = OptimizerStep(plan, ranks, engine, HostGroup(), torch.device("cpu"))
    alive = weakref.WeakSet()
    found = []

    def pack(tensor):
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    engine.module.register_forward_pre_hook(lambda *_: found.append(len(alive)))
    shared = step.share([random_batch(plan, seed) for seed in range(plan.accumulation)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for _ in range(2):
            step(shared.batches, shared.counts)
    return found


def test_nothing_of_a_micro_step_is_kept_during_the_next():
    plan = small_plan(_SMALL, 1, 1, gradient_accumulation_steps=3)
    assert on_ranks(1, _kept_at_each_forward, plan) == [0] * 6
