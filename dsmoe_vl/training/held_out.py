"""Held-out losses during training."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.config.recipe import learned_tasks, term_weights
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.held_out_packs import held_out_packs
from dsmoe_vl.data.pack import collate
from dsmoe_vl.data.pack_shape import SpeechShape
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.tasks.registry import Encoder


class HeldOut:
    """The first packs of every held-out source, `run.evaluate_packs` in all; encoded once, then kept in memory."""

    def __init__(self, plan: RunPlan, ranks: Ranks, encode: Encoder, host: HostGroup) -> None:
        recipe = plan.recipe
        self.terms = tuple(term.name for task in learned_tasks(recipe) for term in task.terms)
        self.weights = term_weights(recipe)
        self.batches: dict[str, list[Batch]] = {}
        sources = recipe.data.evaluation
        for source in sources:
            packs = held_out_packs(
                recipe.data,
                source,
                encode,
                patch_size=recipe.model.vision.patch_size,
                merge=recipe.model.vision.merge,
                rank=ranks.rank,
                ranks=ranks.world_size,
                maximum=host.max,
                speech=SpeechShape.of(recipe),
            )
            share = max(1, recipe.run.evaluate_packs // (len(sources) * ranks.world_size))
            batches = [collate([pack]) for pack in islice(packs, share)]
            pairs = host.gather([len(batch.pair_ids) for batch in batches])  # every rank has the same number of batches
            self.batches[source.name] = [
                replace(batch, pairs_of_ranks=tuple(of_ranks)) for batch, *of_ranks in zip(batches, *pairs, strict=True)
            ]

    @torch.no_grad()
    def sums(self, engine: Any, device: torch.device) -> dict[str, Tensor]:
        """By source, the loss sum and the number of targets of every term in each pack of this rank: float64
        [packs, 2, terms]. Collective."""
        engine.eval()
        found: dict[str, Tensor] = {}
        for name, batches in self.batches.items():
            rows = torch.zeros(len(batches), 2, len(self.terms), device=device, dtype=torch.float64)
            for row, batch in zip(rows, batches, strict=True):
                output, _ = engine(batch.to(device))
                for column, term in enumerate(self.terms):
                    row[0, column] = output.loss_sums[term]
                    row[1, column] = batch.counts[term]
            found[name] = rows
        engine.train()
        return found

    def losses(self, engine: Any, device: torch.device) -> dict[str, float]:
        """Mean loss per target of every term, over all sources (`eval_loss_TERM`) and per source
        (`eval_loss_TERM_SOURCE`), and the weighted sum over terms (`eval_loss`). Collective."""
        sums = {name: of_packs.sum(0) for name, of_packs in self.sums(engine, device).items()}
        stacked = torch.stack(list(sums.values()))
        if dist.get_world_size() > 1:
            dist.all_reduce(stacked)
        totals = {"": stacked.sum(0), **{f"_{name}": stacked[row] for row, name in enumerate(sums)}}
        means = {
            f"eval_loss_{term}{suffix}": float(total[0, column] / total[1, column])
            for suffix, total in totals.items()
            for column, term in enumerate(self.terms)
            if total[1, column] > 0
        }
        return {"eval_loss": sum(self.weights[t] * means.get(f"eval_loss_{t}", 0.0) for t in self.terms), **means}
