"""The first thing that a run which starts from an import does: answer its probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.pretrained.probe import compare, read_probe
from dsmoe_vl.training.engine import full_value


@torch.no_grad()
def check_probe(engine: Any, plan: RunPlan, device: torch.device) -> str | None:
    """A line on the difference; None for an import without a probe. Raises CheckpointError. Collective."""
    folder = plan.recipe.model.init_from
    probe = read_probe(Path(folder)) if folder else None
    if probe is None:
        return None
    vision, backbone = plan.recipe.model.vision, engine.module.backbone
    kept: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0]))
    engine.eval()
    try:
        engine(probe.batch(vision.patch_size, vision.merge).to(device))
    finally:
        handle.remove()
        engine.train()
    logits = kept[0][probe.last.to(device)] @ full_value(backbone.head.weight).t()
    return compare(probe, logits, plan.precision, folder)
