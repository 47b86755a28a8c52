"""Matrices that whiten the states of retrieval, measured on the recipe's data: `launch/whiten.py`.

The states of a pretrained decoder have one large direction in common, and most of the rest in a few more; whatever is
trained over them learns these first. Whitened, every direction has mean 0 and variance 1 over the data: W = S^-1 V^T
from the covariance V S^2 V^T, as many of its largest directions as an embedding is wide. It stands in the retrieval
head as a matrix and a bias that are never trained. Measuring needs one process, and what it writes are weights to start
from, so a run is the same on any topology.

Shapes: n pairs, D width, W width of an embedding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, WeightsFile
from dsmoe_vl.config.imported import MODEL_NAME, ORIGIN_NAME
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.config.task_table import WHITENING
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.moe.placement import placed
from dsmoe_vl.parallel.device import device_name, has_bf16_unit, use_device
from dsmoe_vl.parallel.process_group import end_process_group, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.tasks.task import MultiTaskModel
from dsmoe_vl.training.engine import build_model

SIDES = ("media", "text")
_SETTINGS = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
_LEAST = 1e-6  # of the largest variance; a direction with less is as good as none


class Moments:
    """Sums of states, for their mean and covariance."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, states: Tensor) -> None:
        """states [n, D]."""
        states = states.double().cpu()
        self.count += len(states)
        self.sum += states.sum(0)
        self.products += states.t() @ states

    def whitening(self, wide: int) -> tuple[Tensor, Tensor]:
        """The matrix [W, D] and the bias [W], float32, of the `wide` directions with the largest variance."""
        mean = self.sum / self.count
        variances, directions = torch.linalg.eigh(self.products / self.count - mean.outer(mean))
        variances, directions = variances.flip(0)[:wide], directions.flip(1)[:, :wide]
        matrix = (directions / variances.clamp(min=_LEAST * float(variances[0])).sqrt()).t()
        return matrix.float().contiguous(), (-matrix @ mean).float()


def whiten(recipe_file: Path, overrides: Sequence[str], output: Path, pairs: int) -> dict[str, int]:
    """Measure on `pairs` retrieval pairs, and write the folder `output` for `model.init_from`: the weights that the
    recipe names, what it adds with first values before the heads, and the matrices. Returns how many states each side
    had. Raises ConfigError, CheckpointError, DataError."""
    recipe = load_recipe(recipe_file, overrides)
    _check(recipe, str(recipe_file), pairs)
    retrieval = replace(recipe.tasks.retrieval, whiten=False)
    recipe = replace(recipe, tasks=replace(recipe.tasks, retrieval=retrieval), data=replace(recipe.data, workers=0))
    ranks, name = Ranks(0, 1, 0), device_name()
    device = use_device(name, ranks)
    start_process_group(ranks, name)
    plan = resolve(
        replace(recipe, stages=()), {**_SETTINGS, "bf16": {"enabled": name != "cpu"}}, 1, device=name,
        bf16_unit=has_bf16_unit(name),
    )  # fmt: skip
    tasks = build_tasks(recipe, Tokenizer.of(recipe), training=False)
    model = build_model(plan, ranks, tasks).to(device).eval()
    found = _measured(plan, model, Encoder(tasks), pairs, device)
    matrices = {side: moments.whitening(retrieval.embedding_width) for side, moments in found.items()}
    _write(recipe, model, matrices, output)
    end_process_group()
    return {side: moments.count for side, moments in found.items()}


def _check(recipe: Recipe, file: str, pairs: int) -> None:
    retrieval, model = recipe.tasks.retrieval, recipe.model
    if not model.init_from or not retrieval.weight:
        missing = "model.init_from" if not model.init_from else "tasks.retrieval.weight"
        raise ConfigError(f"{file} has no {missing}: there are no states of pretrained weights to whiten for retrieval")
    if retrieval.embedding_width > model.width:
        raise ConfigError(
            f"tasks.retrieval.embedding_width = {retrieval.embedding_width} in {file}: states have only {model.width} "
            "directions to whiten: set it to that or less"
        )
    if pairs < 2 * retrieval.embedding_width:
        raise ConfigError(
            f"--pairs {pairs}: {retrieval.embedding_width} directions (tasks.retrieval.embedding_width) need at least "
            f"{2 * retrieval.embedding_width}"
        )


@torch.no_grad()
def _measured(
    plan: RunPlan, model: MultiTaskModel, encode: Encoder, pairs: int, device: torch.device
) -> dict[str, Moments]:
    recipe, backbone = plan.recipe, model.backbone
    vision = recipe.model.vision
    loader = Loader(
        recipe.data, recipe.data.sources, encode, vision.patch_size, vision.merge, recipe.run.seed, rank=0, ranks=1,
        micro_batch=1, accumulation=1, speech=PackShape.of(recipe).speech,
    )  # fmt: skip
    found = {side: Moments(recipe.model.width) for side in SIDES}
    steps = iter(loader)
    while found["media"].count < pairs:
        for batch in next(steps):
            batch = batch.to(device)
            hidden, _ = backbone(batch)
            head = backbone.get_submodule("retrieval")
            states = head.states(hidden, batch.media_embedding, batch.text_embedding, batch.cu_segments)  # type: ignore[operator]
            for side, of_side in zip(SIDES, states, strict=True):
                found[side].add(of_side)
    loader.close()
    return found


def _write(recipe: Recipe, model: MultiTaskModel, matrices: dict[str, tuple[Tensor, Tensor]], output: Path) -> None:
    source = Path(recipe.model.init_from)
    heads = {
        name for spec in learned_tasks(recipe)
        for name in spec.head_shapes(getattr(recipe.tasks, spec.name), recipe.model.width)
    }  # fmt: skip
    weights = {where.name: where.parameter.data.cpu() for where in placed(model) if where.name not in heads}
    measured = {
        f"retrieval.{side}{WHITENING}{kind}": value
        for side, pair in matrices.items() for kind, value in zip(("weight", "bias"), pair, strict=True)
    }  # fmt: skip
    settings = json.loads((source / MODEL_NAME).read_text(encoding="utf-8"))
    retrieval = recipe.tasks.retrieval
    settings.setdefault("tasks", {})["retrieval"] = {
        "whiten": True, "embedding_width": retrieval.embedding_width, "pooling": retrieval.pooling,
    }  # fmt: skip
    origin = json.loads((source / ORIGIN_NAME).read_text(encoding="utf-8"))
    fresh = [name for name in weights if name not in origin["tensors"]]
    origin["tensors"] |= {name: _entry("first values") for name in fresh}
    origin["tensors"] |= {name: _entry("measured by launch/whiten.py") for name in measured}
    origin["first_values"] = [name for name in origin["first_values"] if name not in weights]
    make_new_folder(output)
    with writing(output):
        WeightsFile(output).save(weights | measured)
        for file in source.iterdir():
            if file.name not in (INDEX_NAME, MODEL_NAME, ORIGIN_NAME) and not file.name.startswith("model-"):
                shutil.copyfile(file, output / file.name)
        write_json(output / MODEL_NAME, settings)
        write_json(output / ORIGIN_NAME, origin)


def _entry(how: str) -> dict[str, Any]:
    """Of a tensor, in origin.json."""
    return {"folder": "", "from": [], "how": how}
