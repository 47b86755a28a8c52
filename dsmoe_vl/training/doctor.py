"""Does the objective stay the same however the work is split? A recipe, shrunk, trained for two steps in many ways.

Everything that differs between two ways of splitting the same packs (ranks, expert parallelism, ZeRO stage,
accumulation, order of packing) must leave every loss term and every gradient as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.weights import one_process_tensors
from dsmoe_vl.config.recipe import MoEConfig, Recipe
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import Encoded, Packer, PackShape, assemble, collate, encoded
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.moe.router import Router
from dsmoe_vl.objective.objective import Objective, load_fractions
from dsmoe_vl.parallel.launch import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.training.engine import build_engine, build_model, full_gradient
from dsmoe_vl.training.step import OptimizerStep

# Settings of the capacity backend under which no token is dropped and no choice is random.
_WITHOUT_CHANCE: dict[str, Any] = {
    **{name: getattr(MoEConfig(), name) for name in ("capacity_factor", "eval_capacity_factor", "min_capacity")},
    **{"drop_tokens": False, "noisy_gate": "", "random_token_selection": False},
}
PACKS = 8  # of a step
STEPS = 2


@dataclass(frozen=True)
class Split:
    """One way of doing the same work."""

    ranks: int
    ep_size: int
    zero_stage: int
    accumulation: int
    reversed_packs: bool

    @staticmethod
    def grid(ranks: int, stages: tuple[int, ...]) -> list[Split]:
        """Every split on so many ranks."""
        choices = product((1, 2)[:ranks], stages, (1, 2, 4), (False, True))
        return [Split(ranks, *choice) for choice in choices]


def shrink(recipe: Recipe) -> Recipe:
    """The same recipe with a model that trains a step in a moment: narrow, two sparse layers, eight experts at most.

    Without noise and dropped tokens, which depend on the split by their nature.
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
            ffn_width=32, vision=replace(vision, width=32, layers=1, heads=2, ffn_width=32),
        ),
        moe=replace(
            moe, experts=experts, top_k=min(moe.top_k, experts), ffn_width=16, first_dense_layers=dense,
            shared_ffn_width=min(moe.shared_ffn_width, 16), experts_per_layer=(),
            **(_WITHOUT_CHANCE if moe.backend == "capacity" else {}),
        ),
        data=replace(recipe.data, workers=0),
    )  # fmt: skip


class Probe:
    """Runs splits of one recipe on the ranks of this process group."""

    def __init__(self, recipe: Recipe, deepspeed: dict[str, Any], ranks: Ranks, host: HostGroup) -> None:
        """Reads STEPS * PACKS packs of the recipe's own data. Raises DataError where there are none."""
        self.recipe, self.deepspeed, self.ranks, self.host = recipe, deepspeed, ranks, host
        tokenizer = Tokenizer(recipe.tokenizer.path)
        tokenizer.require_fit(recipe.tokenizer.vocab_size)
        self.tasks = build_tasks(recipe, tokenizer)
        vision = recipe.model.vision
        self.shape = PackShape(recipe.data.pack_length, recipe.data.pack_patches, vision.patch_size, vision.merge)
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
        """Every term and the gradient norm of both steps, and every parameter's gradient in the first, under its name
        in the one-process model. The same on every rank. Collective."""
        plan = self.plan(split)
        engine = build_engine(plan, self.ranks, self.tasks)
        take_step = OptimizerStep(plan, self.ranks, engine, self.host, torch.device("cpu"))
        values: dict[str, float] = {}
        gradients: dict[str, Tensor] = {}
        for step in range(STEPS):
            take_step.before_update = partial(_collect, engine.module, gradients) if step == 0 else None
            batches, counts, _ = take_step.share(self._batches(split, step))
            result = take_step(batches, counts)
            values |= {f"{name}, step {step}": float(value) for name, value in result.terms.items()}
            values[f"grad_norm, step {step}"] = result.grad_norm
        engine.destroy()
        return values, gradients

    def batch_with_padding(self, packs: int) -> Batch:
        """Packs that are half empty, at most PACKS."""
        halves = [items[: max(1, len(items) // 2)] for items in self.contents[0][:packs]]
        return collate([self._pack(items) for items in halves])

    def _read(self) -> list[list[list[Encoded]]]:
        """Packs by step, as the samples that they hold: the sources in turn, so that every task takes part."""
        data = self.recipe.data
        encode = Encoder(self.tasks, data.sources)
        streams = cycle([self._samples(source.path, source.name, encode) for source in data.sources])
        packer = Packer(self.shape, data.lookahead)
        return [[packer.fill(lambda: next(next(streams))) for _ in range(PACKS)] for _ in range(STEPS)]

    def _samples(self, path: str, name: str, encode: Encoder) -> Iterator[Encoded]:
        while True:
            usable = 0
            for number, sample in enumerate(iterate_samples(path, name, data=self.recipe.data)):
                try:
                    yield encoded(SampleRef(0, 0, 0, number), sample.key, encode(sample), self.shape)
                    usable += 1
                except DataError:
                    continue
            if not usable:
                raise DataError(f"{path}: no sample can be used by the recipe's tasks")

    def _batches(self, split: Split, step: int) -> list[Batch]:
        """This rank's micro-steps; each holds the same packs over all ranks, whatever their order."""
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


def largest_difference(reference: dict[str, float], other: dict[str, float], names: Iterable[str]) -> tuple[float, str]:
    """The largest relative difference of the named values, and which.

    Numbers below 1e-3 are compared absolutely, as if they were 1e-3: they are differences of larger ones.
    """
    differences = ((abs(other[name] - reference[name]) / max(abs(reference[name]), 1e-3), name) for name in names)
    return max(differences, default=(0.0, ""))


def largest_gradient_difference(reference: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest `||other - reference|| / ||reference||` of a parameter's gradient, and which.

    A gradient smaller than 1e-6 of the whole one is what rounding leaves of 0, and is compared with that.
    """
    assert reference.keys() == other.keys()
    norms = {name: float(gradient.double().norm()) for name, gradient in reference.items()}
    least = 1e-6 * math.hypot(*norms.values())
    differences = {name: float((other[name].double() - value.double()).norm()) for name, value in reference.items()}
    return max((difference / max(norms[name], least), name) for name, difference in differences.items())


def couples_micro_steps(recipe: Recipe) -> bool:
    """Whether terms are defined over the micro-step, so that only splits of equal accumulation can be compared."""
    retrieval, moe = recipe.tasks.retrieval, recipe.moe
    contrast = retrieval.weight > 0 and not retrieval.gradient_cache
    return contrast or moe.global_entropy_weight > 0 or moe.mutual_information_weight > 0


def linear_terms(names: Iterable[str]) -> list[str]:
    """The first step's terms that are the same for every accumulation, whatever else the recipe holds."""
    coupled = ("loss,", "loss_retrieval", "global_entropy", "mutual_information", "grad_norm")
    return [name for name in names if name.endswith("step 0") and not name.startswith(coupled)]


def silent_faults(probe: Probe) -> list[str]:
    """Faults that raise no error, looked for on one rank without an engine; a sentence each."""
    plan = probe.plan(Split(1, 1, 1, 1, False))
    model, objective = build_model(plan, probe.ranks, probe.tasks), Objective(plan)
    faults: list[str] = []

    model.eval()
    batch = probe.batch_with_padding(1)
    with torch.no_grad():
        once, again = (model(batch)[0].loss_sums for _ in range(2))
    faults += [f"evaluation is random: {term} changes when repeated" for term in once if once[term] != again[term]]

    model.train()
    batch = probe.batch_with_padding(plan.micro_batch)
    output, stats = model(batch)
    if stats is not None:
        assigned = round(float(stats.load.sum() + stats.dropped.sum()))
        wanted = batch.counts["tokens"] * plan.recipe.moe.top_k * len(stats.load)
        if assigned != wanted:
            faults.append(f"padding is routed into the statistics: {assigned} assignments of {wanted} real ones")
        routers = [module for module in model.modules() if isinstance(module, Router)]
        gates = [router.task_bias if router.mode == "task" else router.weight for router in routers]
        fractions = load_fractions(stats.load, plan.recipe.moe.balance_over)
        sums = list(output.loss_sums.values())  # none where the gradient cache holds the only task's
        terms = [("the tasks' loss", 1.0, torch.stack(sums).sum())] if sums else []
        for name, _, part in [*terms, *objective.linear(stats, batch.counts, fractions), *objective.coupled(stats)]:
            on = part.requires_grad
            found = torch.autograd.grad(part, gates, retain_graph=True, allow_unused=True) if on else [None]
            if any(gradient is None or not gradient.any() for gradient in found):
                faults.append(f"{name} has no gradient in some router")
    for name, parameter in model.named_parameters():
        marked = getattr(parameter, "allreduce", True) is False
        if marked != (".experts." in name):
            faults.append(f"{name} is {'an expert' if marked else 'dense'} to DeepSpeed: a wrong mean of gradients")
    return faults
