"""Take steps of which the second has a value that is not finite, anew for every ZeRO stage and fault.

Ends with one JSON line: by stage and fault, what every rank found.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_vl.config.recipe import L1Config, ObjectiveConfig, TaskWeightsConfig
from dsmoe_vl.data.pack import collate
from dsmoe_vl.optim.values import owned_values
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_tasks
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.step import OptimizerStep, StepResult
from tests.distributed.stepping import report
from tests.distributed.train_losses import RECIPE
from tests.support.batches import mixed_pack

MOE = replace(RECIPE.moe, bias_rate=0.01)
OBJECTIVE = ObjectiveConfig(L1Config(weight=0.1, matrices=0.5), TaskWeightsConfig("famo"))
RECIPE = replace(RECIPE, moe=MOE, objective=OBJECTIVE)
PACKS = (0, 1, 2)  # of the steps; the second one fails


class Run:
    """One engine and its steps."""

    def __init__(self, args: argparse.Namespace, stage: int, ranks: Ranks) -> None:
        offload = {"device": "cpu" if args.offload else "none"}
        deepspeed = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": args.clipping,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "bf16": {"enabled": args.bf16},
            "zero_optimization": {"stage": stage, "offload_optimizer": offload},
            "expert_parallel": {"enabled": True, "autoep_size": args.ep},
        }
        device = use_device("cpu", ranks)
        plan = resolve(RECIPE, deepspeed, ranks.world_size, device="cpu", bf16_unit=True)
        self.engine = build_engine(plan, ranks, build_tasks(RECIPE, None))
        self.take_step = OptimizerStep(plan, ranks, self.engine, HostGroup(), device)
        self.ranks = ranks

    def step(self, number: int) -> StepResult:
        first = 100 * number + 2 * self.ranks.rank
        batches = [replace(collate([mixed_pack(n)]), keys=[f"sample-{n}"]) for n in (first, first + 1)]
        shared = self.take_step.share(batches)
        return self.take_step(shared.batches, shared.counts)

    def state(self) -> dict[str, Tensor]:
        """Copies of what an update changes on this rank: weights, moments, load fractions, selection bias, and the
        weights of tasks."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.engine.module.named_parameters():
            values = owned_values(parameter, self.ranks.world_size, self.ranks.rank)
            if values is not None:
                found[f"value {name}"] = values
            shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3, where the end of a shard may be padding
            found[f"weight {name}"] = parameter if shard is None else shard[: len(values)]
        for index, of_tensor in enumerate(self.engine.basic_optimizer.state.values()):
            found |= {f"optimizer {index} {name}": value for name, value in of_tensor.items()}
        for index, router in enumerate(self.take_step.routers):
            found[f"bias {index}"] = router.selection_bias
        found["load fractions"] = self.take_step.load_fraction
        of_tasks = self.take_step.state_dict()["task_weights"]
        found |= {f"{name} of tasks": torch.tensor(of_tasks[name]) for name in ("numbers", "losses")}
        return {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}


def nan_in_an_expert(run: Run) -> Callable[[], None]:
    """The gradient of one weight of one expert of the last rank; the loss is finite."""
    if run.ranks.rank != run.ranks.world_size - 1:
        return lambda: None
    expert = next(value for name, value in run.engine.module.named_parameters() if ".experts." in name)

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = math.nan
        return spoiled

    return expert.register_hook(spoil).remove


def infinite_loss(run: Run) -> Callable[[], None]:
    """The loss of the second micro-step of rank 0; its gradient is finite."""
    objective, calls = run.take_step.objective, []

    def spoiled(*args: Any) -> Any:
        loss = objective(*args)
        calls.append(loss)
        if run.ranks.rank or len(calls) != 2:
            return loss
        terms = {**loss.terms, "loss_caption": loss.terms["loss_caption"] + math.inf}
        return replace(loss, scalar=loss.scalar + math.inf, terms=terms)

    spoiled.task_weights = objective.task_weights  # type: ignore[attr-defined]
    run.take_step.objective = spoiled

    def restore() -> None:
        run.take_step.objective = objective

    return restore


FAULTS = {"expert": nan_in_an_expert, "loss": infinite_loss}


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, nargs="+", required=True)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--clipping", type=float, default=0.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    ranks = Ranks.discover()
    start_process_group(ranks, "cpu")
    found: dict[int, dict[str, Any]] = {}
    plain = Run(args, args.zero[0], ranks)  # one for all stages: its rates are the scheduler's
    rates = [plain.step(number).learning_rate for number in PACKS]
    plain.engine.destroy()
    for stage in args.zero:
        without = Run(args, stage, ranks)  # never sees the second step
        without.step(PACKS[0])
        without.engine.lr_scheduler.step()
        without.step(PACKS[2])
        expected = without.state()
        without.engine.destroy()
        found[stage] = {}
        for name, fault in FAULTS.items():
            run = Run(args, stage, ranks)
            first = run.step(PACKS[0])
            before = run.state()
            undo = fault(run)
            second = run.step(PACKS[1])
            changed = different(before, run.state())
            undo()
            third = run.step(PACKS[2])
            own = {
                "changed": changed,
                "changed_then": len(different(before, run.state())),
                "lost": different(expected, run.state()),
                "same_rates": [step.learning_rate for step in (first, second, third)] == rates,
                "skipped": [step.skipped is not None for step in (first, second, third)],
                "names": second.skipped and second.skipped.names,
                "samples": second.skipped and second.skipped.samples,
                "finite_norms": [math.isfinite(step.grad_norm) for step in (first, second, third)],
            }
            found[stage][name] = [None] * ranks.world_size
            dist.all_gather_object(found[stage][name], own)
            run.engine.destroy()
    report(ranks, found)


if __name__ == "__main__":
    main()
