"""From a run directory to a model that can be used: no DeepSpeed, one process, any device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsmoe_vl.checkpoint.store import require_newest
from dsmoe_vl.config.plan import recipe_from_json
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.experts import RemainingExperts


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with what belongs to it."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    recipe: Recipe
    checkpoint: Path
    device: torch.device


def load_run(run_dir: Path, device: str = "cpu") -> TrainedModel:
    """The newest complete checkpoint of a run.

    Raises CheckpointError where there is none, or where weights and recipe do not fit each other.
    """
    checkpoint, manifest = require_newest(run_dir)
    plan_file = run_dir / "plan.json"
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise CheckpointError(
            f"{checkpoint / 'tokenizer.model'} (pieces {tokenizer.sha256[:12]}) is not the tokenizer that the "
            f"checkpoint was trained with ({manifest.tokenizer_sha256[:12]}): restore that file"
        )
    recipe = recipe_from_json(plan_file)
    recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(checkpoint / "tokenizer.model")))
    with torch.device("meta"):
        model = VisionLanguageModel(recipe)
    weights = load_file(checkpoint / "model.safetensors", device=device)
    weights["head.weight"] = weights["embedding.weight"]  # tied: stored once
    try:
        _shrink(model, weights)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / 'model.safetensors'} does not fit the model of {plan_file}: {error}"
        ) from error
    return TrainedModel(model.eval(), tokenizer, recipe, checkpoint, torch.device(device))


def _shrink(model: VisionLanguageModel, weights: dict[str, Tensor]) -> None:
    """Give layers that lost experts when exported the number that is left. Raises AttributeError for unknown layers."""
    for name, kept in weights.items():
        if name.endswith(".experts.kept"):
            experts = name.removesuffix(".kept")
            _, hidden_width, width = weights[f"{experts}.w1"].shape
            with torch.device("meta"):
                model.set_submodule(experts, RemainingExperts(len(kept), width, hidden_width))
