"""What packing is worth: real tokens a second of training steps on packs, beside padded batches of the same samples.

    python benchmarks/packing.py [--recipe TOML] [--deepspeed JSON] [--micro-batch PACKS] [--turns N] [--json FILE]

The samples are those of a recipe's mixture, packed as the loader packs them. The padded batch of a step has a row for
each sample, as long as the longest sample, and the same loss, which is compared first. One engine takes turns with
both: forward, backward and update, on batches that are ready. On a machine that does other work too, the ratio of the
processor's time is steadier than that of the clock.

The padded batch goes through the same code, in the form that is usual for one: attention is causal over whole rows, so
that real tokens do not see the padding after them. The two sides of a retrieval pair stay in one row, each a segment,
because a row of its own for each would pad more. Experts compute padding like any token; a trainer that drops it there
would lose less by it.

Padded pictures are as long as the longest of the step, as transformers' processor of SigLIP 2 (NaFlex) pads them to a
fixed length; the padding is in pictures of its own, which no token sees. "padded texts" has packed pictures: there the
vision encoder has the same work as with packs. The losses and the update have the same work on all sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import ROOT
from train_step import plan_of, report, setting

from dsmoe_vl.command import leave
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.error_log import ErrorLog
from dsmoe_vl.data.pack import Encoded, Packer, PackShape, collate
from dsmoe_vl.data.pack_stream import SampleReader, to_pack
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.stream import Lane, SourceOrder
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.tasks.task import Task

STEPS = 6  # different ones, taken again and again
SIDES = ("packed", "padded", "padded texts")


class Samples:
    """The samples of one pack after another, as the loader's lanes choose them."""

    def __init__(self, recipe: Recipe, tasks: tuple[Task, ...]) -> None:
        from dsmoe_vl.tasks.registry import Encoder

        data = recipe.data
        self.shape = PackShape.of(recipe)
        indexes = {source.name: ShardIndex.load(source.path, data) for source in data.sources}
        log = ErrorLog(data.max_bad_fraction)
        self.reader = SampleReader(data.sources, indexes, Encoder(tasks), self.shape, log)
        orders = [
            SourceOrder(name, index, data.lanes, data.shuffle_block, recipe.run.seed) for name, index in indexes.items()
        ]
        weights = [source.weight ** (1 / data.temperature) for source in data.sources]
        self.lanes = [
            (Lane(number, data.lanes, orders, weights), Packer(self.shape, data.lookahead))
            for number in range(data.lanes)
        ]

    def of_pack(self, number: int) -> list[Encoded]:
        """Those of pack `number` of a run; packs are asked for in their order."""
        lane, packer = self.lanes[number % len(self.lanes)]

        def draw() -> Encoded:
            while (item := self.reader.read(lane.next())) is None:
                pass
            return item

        return packer.fill(draw)


def padded(items: Sequence[Encoded], shape: PackShape) -> Batch:
    """A row for each sample. Padding is part of its row's last segment."""
    longest = max(item.length for item in items)
    row = replace(shape, length=longest, patches=max(shape.merge**2, *(item.patches for item in items)))
    rows = [to_pack([item], row) for item in items]
    lengths = [
        length
        for of_row in (pack.segment_lengths for pack in rows)
        for length in (*of_row[:-1], of_row[-1] + longest - sum(of_row))
    ]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return replace(collate(rows), cu_segments=ends, max_segment=max(lengths))


def with_padded_pictures(batch: Batch) -> Batch:
    """As many patches as if all pictures were as long as the longest; the new ones are at no token."""
    pictures, cell = len(batch.cu_pictures) - 1, len(batch.patches) // len(batch.cell_position)
    room = pictures * batch.max_picture - len(batch.patches)
    lengths = [batch.max_picture] * (room // batch.max_picture) + [room % batch.max_picture] * (
        room % batch.max_picture > 0
    )
    ends = batch.cu_pictures[-1] + torch.tensor(lengths, dtype=torch.int32).cumsum(0).int()

    def longer(values: torch.Tensor, count: int, value: float) -> torch.Tensor:
        return torch.cat((values, values.new_full((count, *values.shape[1:]), value)))

    cells, nowhere = room // cell, len(batch.tokens)
    return replace(
        batch, patches=longer(batch.patches, room, 0), patch_positions=longer(batch.patch_positions, room, 0),
        cu_pictures=torch.cat((batch.cu_pictures, ends)), cell_position=longer(batch.cell_position, cells, nowhere),
        cell_weight=longer(batch.cell_weight, cells, 0), cell_time=longer(batch.cell_time, cells, -1),
        cell_frame=longer(batch.cell_frame, cells, nowhere),
        cell_frame_weight=longer(batch.cell_frame_weight, cells, 0),
    )  # fmt: skip


class Bench:
    """One engine, and the batches of some steps in all forms."""

    def __init__(self, plan: RunPlan, ranks: Ranks) -> None:
        from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
        from dsmoe_vl.tasks.registry import build_tasks
        from dsmoe_vl.training.engine import build_engine
        from dsmoe_vl.training.step import OptimizerStep

        self.plan, self.device = plan, use_device(plan.device, ranks)
        start_process_group(ranks, plan.device)
        tasks = build_tasks(plan.recipe, Tokenizer.of(plan.recipe))
        samples = Samples(plan.recipe, tasks)
        self.samples = 0
        self.batches: dict[str, list[Batch]] = {side: [] for side in SIDES}
        for step in range(STEPS):
            packs = [samples.of_pack(step * plan.micro_batch + number) for number in range(plan.micro_batch)]
            items = [item for pack in packs for item in pack]
            self.samples += len(items)
            self.batches["packed"].append(collate([to_pack(pack, samples.shape) for pack in packs]))
            self.batches["padded texts"].append(padded(items, samples.shape))
            self.batches["padded"].append(with_padded_pictures(self.batches["padded texts"][-1]))
        self.step = OptimizerStep(plan, ranks, build_engine(plan, ranks, tasks), HostGroup(), self.device)

    def take(self, side: str, index: int) -> tuple[float, float]:
        """Seconds of one step, by the clock and of this process."""
        batches = [self.batches[side][index % STEPS].to(self.device)]
        started, worked = self._now(), time.process_time()
        shared = self.step.share(batches)
        self.step(shared.batches, shared.counts)
        return self._now() - started, time.process_time() - worked

    def require_same_losses(self) -> None:
        """Raises SystemExit if a step's loss depends on its form."""
        limit = 1e-4 if self.plan.precision == "fp32" else 2e-2
        for index in range(STEPS):
            losses = []
            for side in SIDES:
                shared = self.step.share([self.batches[side][index].to(self.device)])
                with torch.no_grad():
                    output, stats = self.step.engine(shared.batches[0])
                    loss = self.step.objective(output, stats, shared.counts, self.step.load_fraction)
                losses.append(float(loss.scalar))
            if not all(abs(loss / losses[0] - 1) <= limit for loss in losses):
                raise SystemExit(f"step {index}: losses of {', '.join(SIDES)}: {losses}")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(plan: RunPlan, ranks: Ranks, turns: int) -> dict[str, Any]:
    """Rates of real tokens, and their ratio turn by turn."""
    bench = Bench(plan, ranks)
    bench.require_same_losses()
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(-2, turns):  # the first ones warm up
        for side in SIDES[turn % 3 :] + SIDES[: turn % 3]:
            taken = bench.take(side, turn)
            if turn >= 0:
                times[side].append(taken)
    result: dict[str, Any] = {
        **setting(plan), "threads": torch.get_num_threads(), "turns": turns, "samples_a_step": bench.samples / STEPS,
    }  # fmt: skip
    seconds = {side: [clock for clock, _ in found] for side, found in times.items()}
    for side, batches in bench.batches.items():
        real = [batches[turn % STEPS].counts["tokens"] for turn in range(turns)]
        tokens = sum(len(batch.tokens) for batch in batches)
        result[side] = {
            "tokens_a_step": tokens / STEPS,
            "patches_a_step": sum(len(batch.patches) for batch in batches) / STEPS,
            "real_share": sum(batch.counts["tokens"] for batch in batches) / tokens,
            "real_tokens_per_second": _spread([a / b for a, b in zip(real, seconds[side], strict=True)], 1),
            "step_ms": _spread([1e3 * value for value in seconds[side]], 1),
        }
    for side in SIDES[1:]:
        for index, suffix in enumerate(("", "_processor")):
            pairs = zip(times["packed"], times[side], strict=True)
            result[f"packed_over_{side.replace(' ', '_')}{suffix}"] = _spread(
                [b[index] / a[index] for a, b in pairs], 3
            )
    bench.step.engine.destroy()
    return result


def _spread(values: list[float], digits: int) -> list[float]:
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def main() -> int:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "launch/recipes/three_tasks.toml")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs/moe.json")
    parser.add_argument("--micro-batch", type=int, help="packs, in place of the JSON's")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    ranks = Ranks.discover()
    if ranks.world_size > 1:
        raise SystemExit("packing.py is one process: padded batches of several ranks would differ in length")
    plan = plan_of(load_recipe(args.recipe, args.overrides), args, ranks)
    if plan.accumulation > 1:
        raise SystemExit("packing.py takes steps of one micro-batch: leave gradient_accumulation_steps at 1")
    report("packing", measure(plan, ranks, args.turns), ranks, args)
    return 0


if __name__ == "__main__":
    leave(main())
