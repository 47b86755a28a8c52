"""The training loop: one optimizer step after another, with evaluation, checkpoints and a clean stop.

One step: batches of all micro-steps -> global target counts (one small all-reduce on the host) -> forward, objective
and backward of each -> the engine's update -> one small all-reduce of loss terms and expert loads.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.checkpoint.store import newest_complete, require_fit
from dsmoe_vl.config.plan import RunPlan
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.segment import Batch
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.moe.stats import RouterStats
from dsmoe_vl.objective.objective import Objective, uniform_load
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.launch import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.training import state
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.evaluate import HeldOut
from dsmoe_vl.training.monitor import Monitor
from dsmoe_vl.training.signals import StopRequest
from dsmoe_vl.training.window import Window


class Trainer:
    """Everything of one run on one rank. Building it starts no process group: `launch/train.py` has done so."""

    def __init__(self, plan: RunPlan, ranks: Ranks) -> None:
        self.plan, self.ranks = plan, ranks
        recipe = plan.recipe
        self.device = use_device(plan.device, ranks.local_rank)
        self.host = HostGroup()
        self.tokenizer = Tokenizer(recipe.tokenizer.path)
        self.tokenizer.require_fit(recipe.tokenizer.vocab_size)
        self.tasks = build_tasks(recipe, self.tokenizer)
        self.terms = tuple(term for task in self.tasks for term in task.terms)
        self.objective = Objective(plan)
        encode = Encoder(self.tasks)
        self.loader = Loader(
            recipe.data,
            recipe.data.sources,
            encode,
            patch_size=recipe.model.vision.patch_size,
            merge=recipe.model.vision.merge,
            seed=recipe.run.seed,
            rank=ranks.rank,
            ranks=ranks.world_size,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            quarantine=plan.run_dir / f"quarantine_{ranks.rank:05d}.jsonl",
        )
        self.held_out = HeldOut(plan, ranks, encode, self.terms, self.host)
        self.engine = build_engine(plan, ranks, self.tasks)
        sparse_layers = recipe.model.layers - recipe.moe.first_dense_layers
        self.load_fraction = uniform_load(sparse_layers, recipe.moe.experts, self.device) if sparse_layers else None
        self.step = 0
        self._resume()
        self.monitor = Monitor(plan, ranks.rank, self.step)
        self.window = Window(plan)

    def fit(self) -> None:
        """Train to `run.steps`, or to a signal; both end with a checkpoint."""
        run = self.plan.recipe.run
        if self.step:
            self.monitor.say(f"resumed at step {self.step}")
        saved = self.step
        with StopRequest() as stop:
            batches = iter(self.loader)
            if self.step == 0:
                self.evaluate()  # where the held-out losses start
            while self.step < run.steps:
                started = time.perf_counter()
                step_batches = next(batches)
                waited = time.perf_counter() - started
                *counts, stop_requests = self.host.sum([*self._local_counts(step_batches), int(stop.received)])
                self._train_step(step_batches, dict(zip(("tokens", "patches", *self.terms), counts, strict=True)))
                self.window.time(time.perf_counter() - started, waited)
                self.step += 1
                self.monitor.advance()
                if self.step % run.log_every == 0 or self.step == run.steps:
                    self.monitor.log(self.step, {**self.window.close(), **self._samples_read()})
                last = self.step == run.steps
                if last or (run.evaluate_every and self.step % run.evaluate_every == 0):
                    self.evaluate()
                if last or self.step % run.checkpoint_every == 0:
                    self.save()
                    saved = self.step
                if stop_requests:
                    break
            if saved != self.step:
                self.save()
        if self.step < run.steps:
            self.monitor.say(f"stopped at step {self.step} of {run.steps}; the same command continues from here")

    def evaluate(self) -> None:
        """Held-out losses, on all ranks together."""
        if self.plan.recipe.data.evaluation:
            self.monitor.log_evaluation(self.step, self.held_out.losses(self.engine, self.device))

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        folder = state.save(
            self.plan, self.ranks, self.host, self.engine, self.tokenizer,
            self.step, self.load_fraction, self.loader.state_dict(),
        )  # fmt: skip
        self.monitor.say(f"saved {folder}")

    def close(self) -> None:
        """End loader processes, writers and the process group."""
        self.loader.close()
        self.monitor.close()
        self.engine.destroy()
        self.host.barrier()
        dist.destroy_process_group()

    def _resume(self) -> None:
        found = newest_complete(Path(self.plan.run_dir) / "checkpoints")
        if found is None:
            return
        folder, manifest = found
        require_fit(folder, manifest, state.topology_of(self.plan), self.tokenizer.sha256)
        self.step, self.load_fraction, data = state.restore(folder, self.ranks, self.engine, self.device)
        self.loader.load_state_dict(data)

    def _samples_read(self) -> dict[str, int]:
        """Samples and errors of every source, over all ranks."""
        total: Counter[str] = Counter()
        for report in self.host.gather(self.loader.report()):
            total.update(report)
        return dict(total)

    def _local_counts(self, batches: list[Batch]) -> list[int]:
        patches = sum(len(batch.patches) for batch in batches)
        tokens, *targets = (sum(batch.counts[name] for batch in batches) for name in ("tokens", *self.terms))
        return [tokens, patches, *targets]

    def _train_step(self, batches: list[Batch], counts: dict[str, int]) -> None:
        learning_rate = self.engine.get_lr()[0]
        terms: dict[str, Tensor] = {}
        layer_stats: list[RouterStats] = []
        for batch in batches:
            output, stats = self.engine(batch.to(self.device))
            loss = self.objective(output, stats, counts, self.load_fraction)
            self.engine.backward(loss.scalar)
            self.engine.step()
            for name, value in loss.terms.items():
                terms[name] = terms[name] + value if name in terms else value
            if stats is not None:
                layer_stats.append(RouterStats(*(value.detach() for value in stats)))
        terms, load, entropy = self._reduce(terms, layer_stats)
        self.window.add(terms, load, entropy, counts, learning_rate, self.engine.get_global_grad_norm())
        if load is not None:
            per_expert = load.sum((1, 2))
            self.load_fraction = per_expert / per_expert.sum(-1, keepdim=True)

    def _reduce(
        self, terms: dict[str, Tensor], stats: list[RouterStats]
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Loss terms, load [N, J, M, E] and entropy sums [N] of the whole step, over all ranks: one all-reduce."""
        pieces = [torch.stack(list(terms.values()))]
        if stats:
            load, entropy = (
                torch.stack(list(sums)).sum(0) for sums in zip(*((s.load, s.entropy_sum) for s in stats), strict=True)
            )
            pieces += [load.flatten(), entropy]
        flat = torch.cat([piece.float() for piece in pieces])
        if self.ranks.world_size > 1:
            dist.all_reduce(flat)
        values, *rest = flat.split([piece.numel() for piece in pieces])
        reduced = dict(zip(terms, values.unbind(), strict=True))
        return (reduced, rest[0].view_as(load), rest[1]) if stats else (reduced, None, None)
