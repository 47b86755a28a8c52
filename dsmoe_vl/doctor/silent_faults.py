"""Checks a recipe's model for faults that raise no error, on one rank without an engine."""

from __future__ import annotations

import torch

from dsmoe_vl.doctor.splits import Probe, Split
from dsmoe_vl.moe.router import Router
from dsmoe_vl.objective.objective import Objective, load_fractions
from dsmoe_vl.training.engine import build_model


def silent_faults(probe: Probe) -> list[str]:
    """One sentence per fault."""
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
            faults.append(f"routing statistics include padding: {assigned} assignments, {wanted} of real tokens")
        routers = [module for module in model.modules() if isinstance(module, Router)]
        gates = [router.task_bias if router.mode == "task" else router.weight for router in routers]
        fractions = load_fractions(stats.load, plan.recipe.moe.balance_over)
        sums = list(output.loss_sums.values())  # empty if the gradient cache computes the only task's loss
        terms = [("the tasks' loss", 1.0, torch.stack(sums).sum())] if sums else []
        for name, _, part in [*terms, *objective.linear(stats, batch.counts, fractions), *objective.coupled(stats)]:
            on = part.requires_grad
            found = torch.autograd.grad(part, gates, retain_graph=True, allow_unused=True) if on else [None]
            if any(gradient is None or not gradient.any() for gradient in found):
                faults.append(f"{name} has no gradient in some router")
    for name, parameter in model.named_parameters():
        marked = getattr(parameter, "allreduce", True) is False
        if marked != (".experts." in name):
            faults.append(f"{name} is {'an expert' if marked else 'dense'} to DeepSpeed: wrong mean of its gradients")
    return faults
