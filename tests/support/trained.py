"""Runs that were never trained: random weights, written as a checkpoint is. They load in a moment."""

from __future__ import annotations

from pathlib import Path

import torch

from dsmoe_vl.checkpoint.store import checkpoint_name
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.model.init import initialise
from dsmoe_vl.planner.plan import plan_to_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.checkpoints import complete_with
from tests.support.runs import TinyProject

THREE_TASKS = ("tasks.retrieval.weight=1", "tasks.retrieval.embedding_width=16", "tasks.summary.weight=1")


def random_run(tiny: TinyProject, folder: Path, *overrides: str, seed: int = 3) -> Path:
    """Write a run of the tiny recipe with `overrides` into `folder`."""
    recipe = load_recipe(tiny.recipe, list(overrides))
    plan = resolve(recipe, load_deepspeed(tiny.deepspeed()), 1, device="cpu", bf16_unit=True)
    model = build_backbone(recipe)
    initialise(model, seed)
    with torch.no_grad():
        # The first values give near-equal logits, and texts that repeat one token; these make the choices clear.
        model.embedding.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.out.weight", "down.weight", "experts.w2", "mlp.w2")):
                parameter.mul_(25)
        if hasattr(model, "importance"):
            model.importance.score.weight.mul_(3)
    checkpoint = folder / "checkpoints" / checkpoint_name(7)
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer.model").write_bytes((tiny.data / "tokenizer.model").read_bytes())
    (folder / "plan.json").write_text(plan_to_json(plan))
    sha256 = Tokenizer(checkpoint / "tokenizer.model", hears=recipe.model.hears).sha256
    complete_with(checkpoint, model.state_dict(), sha256)
    return folder
