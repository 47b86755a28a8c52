"""Loads a trained model from a run directory: one process, any device, without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmoe_vl.checkpoint.manifest import require_content
from dsmoe_vl.checkpoint.store import PLAN_NAME, require_newest, tokenizer_in
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.model.without_values import without_values
from dsmoe_vl.moe.experts import RemainingExperts
from dsmoe_vl.planner.plan import recipe_from_json
from dsmoe_vl.tasks.media import MediaReader
from dsmoe_vl.tasks.registry import build_backbone
from dsmoe_vl.tasks.task import Task

T = TypeVar("T", bound=Task)

_REASON_LETTERS = 300  # of PyTorch's message, which lists every tensor, are printed


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, with its tokenizer, recipe and checkpoint."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    recipe: Recipe
    checkpoint: Path
    device: torch.device

    def task(self, kind: type[T]) -> T:
        """The task of class `kind`, without dropout and augmentation.

        Raises ConfigError if the model has not learned it.
        """
        require_task(self, kind.name)
        reader = MediaReader.of(self.recipe, training=False)
        return kind(reader, self.tokenizer, getattr(self.recipe.tasks, kind.name), training=False)


def load_run(run_dir: Path, device: str | None = "cpu") -> TrainedModel:
    """Load the newest complete checkpoint of a run. `device` None: a GPU if available.

    Raises CheckpointError if there is none, or if the weights do not fit the recipe; ConfigError if the device is not
    available.
    """
    place = _device(device)
    checkpoint, manifest = require_newest(run_dir)
    plan_file, tokenizer_file = run_dir / PLAN_NAME, tokenizer_in(checkpoint)
    recipe = recipe_from_json(plan_file)
    tokenizer = Tokenizer(tokenizer_file, recipe.tokenizer, hears=recipe.model.hears)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise CheckpointError(
            f"{tokenizer_file} (pieces {tokenizer.sha256[:12]}) is not the tokenizer that the "
            f"checkpoint was trained with ({manifest.tokenizer_sha256[:12]}): restore that file"
        )
    recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(tokenizer_file)))
    # If experts drop tokens, a token's output depends on later tokens and on the rest of its batch: a picture's caption
    # would change with the batch, and keys could not be cached. At inference no token is dropped.
    computed = replace(recipe, moe=replace(recipe.moe, drop_tokens=False))
    with without_values():
        model = build_backbone(computed)
    file = WeightsFile(checkpoint)
    try:
        require_content(checkpoint, manifest, (file.path.name, *sorted(set(file.places.values()))))
        weights = file.load(str(place))
        if recipe.model.tied:
            weights["head.weight"] = weights["embedding.weight"]  # stored once
        _shrink(model, weights)
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:_REASON_LETTERS].rstrip(". ")
        raise CheckpointError(
            f"{file.path} does not fit the model of {plan_file}: {reason}. Name a run of this version of dsmoe_vl."
        ) from error
    return TrainedModel(model.eval(), tokenizer, recipe, checkpoint, place)


def require_task(trained: TrainedModel, task: str) -> None:
    """Raise ConfigError if the model has not learned the task of that name."""
    learned = [spec.name for spec in learned_tasks(trained.recipe)]
    if task not in learned:
        raise ConfigError(
            f"{trained.checkpoint} has learned {', '.join(learned)}, not {task}: name a run whose recipe has "
            f"tasks.{task}.weight above 0"
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is unknown: give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: {torch.cuda.device_count()} GPUs are visible; give cpu or another number")
    return device


def _shrink(model: VisionLanguageModel, weights: dict[str, Tensor]) -> None:
    """Resize layers that lost experts in the export to the experts left. Raises AttributeError for unknown layers."""
    for name, kept in weights.items():
        if name.endswith(".experts.kept"):
            experts = name.removesuffix(".kept")
            _, hidden_width, width = weights[f"{experts}.w1"].shape
            with without_values():
                model.set_submodule(experts, RemainingExperts(len(kept), width, hidden_width))
