"""Trains a shrunk recipe for two steps under many splits, to check that the objective does not depend on the split.

Ranks, expert parallelism, ZeRO stage, gradient accumulation and the order of packing must not change any loss term or
gradient of the same packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.weights import one_process_tensors
from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.config.recipe import PartConfig, Recipe, SourceConfig
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import Encoded, Packer, assemble, collate, encoded
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.training.engine import build_engine, full_gradient
from dsmoe_vl.training.step import OptimizerStep

# Deterministic settings of the capacity backend, without token dropping.
_WITHOUT_CHANCE: dict[str, Any] = {
    **{name: getattr(MoEConfig(), name) for name in ("capacity_factor", "eval_capacity_factor", "min_capacity")},
    **{"drop_tokens": False, "noisy_gate": "", "random_token_selection": False},
}
PACKS = 8  # per step
STEPS = 2


@dataclass(frozen=True)
class Split:
    """One way to split the same work."""

    ranks: int
    ep_size: int
    zero_stage: int
    accumulation: int
    reversed_packs: bool

    @staticmethod
    def grid(ranks: int, stages: tuple[int, ...]) -> list[Split]:
        """Every split on `ranks` ranks."""
        choices = product((1, 2)[:ranks], stages, (1, 2, 4), (False, True))
        return [Split(ranks, *choice) for choice in choices]


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe with a small, fast model: narrow, two sparse layers, at most eight experts.

    Without routing noise and token dropping, which depend on the split by design. All of it trains: patterns of names
    need not be about the small model.
    """
    model, moe, vision = recipe.model, recipe.moe, recipe.model.vision
    ratio = model.heads // model.kv_heads
    kv_heads = 2 if ratio <= 2 else 1
    dense = min(moe.first_dense_layers, 1)
    experts = min(moe.experts, 8)
    return replace(
        recipe,
        model=replace(
            model, width=16 * kv_heads * ratio, layers=dense + 2, heads=kv_heads * ratio, kv_heads=kv_heads,
            ffn_width=32, head_width=16 if model.head_width else 0,
            rope_sections=(4, 2, 2) if model.rope_sections else (),
            vision=replace(vision, width=32, layers=1, heads=2, ffn_width=32, connector_width=0,
                           taps=(0,) if vision.taps else ()),
        ),
        moe=replace(
            moe, experts=experts, top_k=min(moe.top_k, experts), ffn_width=16, first_dense_layers=dense,
            shared_ffn_width=min(moe.shared_ffn_width, 16), experts_per_layer=(),
            **(_WITHOUT_CHANCE if moe.backend == "capacity" else {}),
        ),
        data=replace(recipe.data, workers=0),
        tasks=replace(recipe.tasks, retrieval=replace(recipe.tasks.retrieval, align=False)),
        lora=replace(recipe.lora, rank=min(recipe.lora.rank, 8)), train={"*": PartConfig(freeze=False)}, stages=(),
    )  # fmt: skip


class Probe:
    """Runs splits of one recipe on the ranks of this process group."""

    def __init__(self, recipe: Recipe, deepspeed: dict[str, Any], ranks: Ranks, host: HostGroup) -> None:
        """Reads STEPS * PACKS packs of the recipe's own data. Raises DataError if there are none."""
        self.recipe, self.deepspeed, self.ranks, self.host = recipe, deepspeed, ranks, host
        tokenizer = Tokenizer.of(recipe)
        self.tasks = build_tasks(recipe, tokenizer)
        self.shape = PackShape.of(recipe)
        self.contents = self._read()

    def plan(self, split: Split) -> RunPlan:
        """The run plan of a split, in fp32 on a CPU."""
        micro_batch = PACKS // (split.ranks * split.accumulation)
        ours = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": split.accumulation,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": split.zero_stage},
            "gradient_clipping": 1.0,
            "expert_parallel": {"enabled": True, "autoep_size": split.ep_size},
        }
        if "activation_checkpointing" in self.deepspeed:
            ours["activation_checkpointing"] = self.deepspeed["activation_checkpointing"]
        return resolve(self.recipe, ours, split.ranks, device="cpu", bf16_unit=False)

    def run(self, split: Split) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Every term and the gradient norm of both steps, and every parameter's gradient of the first step, by its name
        in the one-process model. The same on every rank. Collective."""
        plan = self.plan(split)
        engine = build_engine(plan, self.ranks, self.tasks)
        take_step = OptimizerStep(plan, self.ranks, engine, self.host, torch.device("cpu"))
        values: dict[str, float] = {}
        gradients: dict[str, Tensor] = {}
        for step in range(STEPS):
            take_step.before_update = partial(_collect, engine.module, gradients) if step == 0 else None
            shared = take_step.share(self._batches(split, step))
            result = take_step(shared.batches, shared.counts)
            values |= {f"{name}, step {step}": float(value) for name, value in result.terms.items()}
            values[f"grad_norm, step {step}"] = result.grad_norm
        engine.destroy()
        return values, gradients

    def batch_with_padding(self, packs: int) -> Batch:
        """Half-empty packs, at most PACKS."""
        halves = [items[: max(1, len(items) // 2)] for items in self.contents[0][:packs]]
        return collate([self._pack(items) for items in halves])

    def _read(self) -> list[list[list[Encoded]]]:
        """The encoded samples of every pack of every step, from the sources in turn, so that every task is included."""
        data = self.recipe.data
        encode = Encoder(self.tasks)
        streams = cycle([self._samples(source, encode) for source in data.sources])
        packer = Packer(self.shape, data.lookahead)
        return [[packer.fill(lambda: next(next(streams))) for _ in range(PACKS)] for _ in range(STEPS)]

    def _samples(self, source: SourceConfig, encode: Encoder) -> Iterator[Encoded]:
        """Without end. Bad samples are passed over and not reported, as any samples will do; DataError if all are."""
        while True:
            usable = 0
            samples = iterate_samples(source, data=self.recipe.data, failed=lambda shard, number, error: None)
            for number, sample in enumerate(samples):
                try:
                    yield encoded(SampleRef(0, 0, 0, number), sample.key, encode(sample), self.shape)
                    usable += 1
                except DataError:
                    continue
            if not usable:
                raise DataError(f"{source.path}: no sample can be used by the recipe's tasks")

    def _batches(self, split: Split, step: int) -> list[Batch]:
        """This rank's micro-steps. Over all ranks, each one has the same packs, in any order."""
        size = PACKS // split.accumulation
        micro_steps = [self.contents[step][i : i + size] for i in range(0, PACKS, size)]
        batches = []
        for contents in micro_steps:
            ordered = [items[::-1] for items in contents[::-1]] if split.reversed_packs else contents
            batches.append(collate([self._pack(items) for items in ordered[self.ranks.rank :: split.ranks]]))
        return batches

    def _pack(self, items: list[Encoded]) -> Pack:
        return assemble([segment for item in items for segment in item.segments], self.shape)


def _collect(module: torch.nn.Module, gradients: dict[str, Tensor]) -> None:
    gradients.update((name, value.clone()) for name, value in one_process_tensors(module, full_gradient))
