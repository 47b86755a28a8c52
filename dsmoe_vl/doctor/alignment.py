"""Matrices that align the states of pictures and of texts, measured on the recipe's data: `launch/align.py`.

The states of a pretrained decoder have one large direction in common, and most of the rest in a few more; whatever is
trained over them learns these first. What pictures and their texts have in common can be computed instead: regularised
canonical correlation analysis (Hotelling 1936; Vinod 1976). With the covariances Cm of the media states, Ct of the text
states and Cmt between them, and shrinkage a: Wm = (Cm + a tr(Cm) / D)^-1/2, Wt likewise, and U S V^T = Wm Cmt Wt. The
sides' matrices are S U^T Wm and S V^T Wt, the W directions with the largest correlations S, each as strong as it is
certain. They stand in the retrieval head and are never trained. Measuring needs one process, and what it writes are
weights to start from, so a run is the same on any topology.

Shapes: n pairs, D width, W width of an embedding.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, WeightsFile
from dsmoe_vl.config.imported import MODEL_NAME, ORIGIN_NAME
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.config.task_table import ALIGNMENT
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.metrics.retrieval import rank_of
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
_SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # that are tried
_HELD = 10  # of so many contents, one is held back to choose by
_MOST_HELD = 2000  # pairs


class Moments:
    """Sums of the states of pairs, for their means and covariances."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2 * width, dtype=torch.float64)
        self.products = torch.zeros(2 * width, 2 * width, dtype=torch.float64)

    def add(self, media: Tensor, text: Tensor) -> None:
        """media, text [n, D]: row by row of one pair."""
        states = torch.cat((media, text), -1).double().cpu()
        self.count += len(states)
        self.sums += states.sum(0)
        self.products += states.t() @ states

    def correlation(self) -> Correlation:
        """What all shrinkages share."""
        mean = self.sums / self.count
        covariance = self.products / self.count - mean.outer(mean)
        width = len(mean) // 2
        parts = [torch.linalg.eigh(covariance[part, part]) for part in (slice(width), slice(width, None))]
        (_, of_media), (_, of_text) = parts
        between = of_media.t() @ covariance[:width, width:] @ of_text
        return Correlation(tuple(mean.split(width)), [p[0].clamp(min=0) for p in parts], [p[1] for p in parts], between)


@dataclass(frozen=True)
class Correlation:
    """Of media and text states: their means, variances and directions (columns) and the covariance between these."""

    means: Sequence[Tensor]
    variances: Sequence[Tensor]
    directions: Sequence[Tensor]
    between: Tensor

    def matrices(self, wide: int, shrinkages: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """For media and text the matrix [W, D] and the bias [W], float32."""
        scales = [(v + a * v.mean()).rsqrt() for v, a in zip(self.variances, shrinkages, strict=True)]
        left, correlations, right = torch.linalg.svd(scales[0].unsqueeze(1) * self.between * scales[1])
        found = []
        for mean, scale, directions, turned in zip(
            self.means, scales, self.directions, (left[:, :wide], right[:wide].t()), strict=True
        ):
            matrix = correlations[:wide].unsqueeze(1) * (directions @ (scale.unsqueeze(1) * turned)).t()
            found.append((matrix.float().contiguous(), (-matrix @ mean).float()))
        return found


class Measured:
    """States of pairs: moments of most, and those of every tenth content, by which the shrinkages are chosen."""

    def __init__(self, width: int) -> None:
        self.moments = Moments(width)
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []
        self.count = 0

    def add(self, media: Tensor, text: Tensor, contents: Tensor) -> None:
        """media, text [n, D]; contents int64 [n]: equal numbers for equal content."""
        self.count += len(contents)
        media, text, contents = media.float().cpu(), text.float().cpu(), contents.cpu()
        held = (contents % _HELD == 0) & (sum(len(part[2]) for part in self.held) < _MOST_HELD)
        self.moments.add(media[~held], text[~held])
        self.held.append((media[held], text[held], contents[held]))

    def alignment(self, wide: int) -> Alignment:
        """The matrices of all pairs, with the shrinkages that rank those held back best."""
        media, text, contents = (torch.cat(parts) for parts in zip(*self.held, strict=True))
        chosen, best = [0.1, 0.1], -1.0
        if len(contents):
            correlation = self.moments.correlation()
            for side in (1, 0):  # one after the other: each costs a decomposition
                for shrinkage in _SHRINKAGES:
                    tried = [shrinkage if side == at else chosen[at] for at in (0, 1)]
                    rank = mean_reciprocal_rank(media, text, contents, correlation.matrices(wide, tried))
                    if rank > best:
                        best, kept = rank, tried
                chosen = kept
            self.moments.add(media, text)
        return Alignment(self.moments.correlation().matrices(wide, chosen), chosen, best, len(contents), self.count)


@dataclass(frozen=True)
class Alignment:
    """The matrices and biases of media and text, the shrinkages, and how well they ranked the pairs held back."""

    matrices: Sequence[tuple[Tensor, Tensor]]
    shrinkages: Sequence[float]
    reciprocal_rank: float  # mean over both directions
    held_back: int
    pairs: int


def mean_reciprocal_rank(
    media: Tensor, text: Tensor, contents: Tensor, matrices: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """Of the right one among all, mean of both directions. media, text [n, D], contents int64 [n]."""
    first, second = (
        F.normalize(F.linear(states, *pair), dim=-1).numpy()
        for states, pair in zip((media, text), matrices, strict=True)
    )
    right = (contents.unsqueeze(1) == contents).numpy()
    similarity = first @ second.T
    ranks = [rank_of(*row) for scores in (similarity, similarity.T) for row in zip(scores, right, strict=True)]
    return statistics.fmean(1 / rank for rank in ranks)


def align(recipe_file: Path, overrides: Sequence[str], output: Path, pairs: int) -> Alignment:
    """Measure on `pairs` retrieval pairs, and write the folder `output` for `model.init_from`: the weights that the
    recipe names, what it adds with first values before the heads, and the matrices. Raises ConfigError,
    CheckpointError, DataError."""
    recipe = load_recipe(recipe_file, overrides)
    _check(recipe, str(recipe_file), pairs)
    retrieval = replace(recipe.tasks.retrieval, align=False)
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
    found = _measured(plan, model, Encoder(tasks), pairs, device).alignment(retrieval.embedding_width)
    _write(recipe, model, found, output)
    end_process_group()
    return found


def _check(recipe: Recipe, file: str, pairs: int) -> None:
    retrieval, model = recipe.tasks.retrieval, recipe.model
    if not model.init_from or not retrieval.weight:
        missing = "model.init_from" if not model.init_from else "tasks.retrieval.weight"
        raise ConfigError(f"{file} has no {missing}: there are no states of pretrained weights to align for retrieval")
    if retrieval.embedding_width > model.width:
        raise ConfigError(
            f"tasks.retrieval.embedding_width = {retrieval.embedding_width} in {file}: states have only {model.width} "
            "directions to align: set it to that or less"
        )
    if pairs < 2 * retrieval.embedding_width:
        raise ConfigError(
            f"--pairs {pairs}: {retrieval.embedding_width} directions (tasks.retrieval.embedding_width) need at least "
            f"{2 * retrieval.embedding_width}"
        )


@torch.no_grad()
def _measured(plan: RunPlan, model: MultiTaskModel, encode: Encoder, pairs: int, device: torch.device) -> Measured:
    recipe, backbone = plan.recipe, model.backbone
    vision = recipe.model.vision
    loader = Loader(
        recipe.data, recipe.data.sources, encode, vision.patch_size, vision.merge, recipe.run.seed, rank=0, ranks=1,
        micro_batch=1, accumulation=1, speech=PackShape.of(recipe).speech,
    )  # fmt: skip
    found = Measured(recipe.model.width)
    steps = iter(loader)
    while found.count < pairs:
        for batch in next(steps):
            batch = batch.to(device)
            hidden, _ = backbone(batch)
            head = backbone.get_submodule("retrieval")
            states = head.states(hidden, batch.media_embedding, batch.text_embedding, batch.cu_segments)  # type: ignore[operator]
            found.add(states[0], states[1], batch.pair_ids)
    loader.close()
    return found


def _write(recipe: Recipe, model: MultiTaskModel, alignment: Alignment, output: Path) -> None:
    source = Path(recipe.model.init_from)
    heads = {
        name for spec in learned_tasks(recipe)
        for name in spec.head_shapes(getattr(recipe.tasks, spec.name), recipe.model.width)
    }  # fmt: skip
    weights = {where.name: where.parameter.data.cpu() for where in placed(model) if where.name not in heads}
    measured = {
        f"retrieval.{side}{ALIGNMENT}{kind}": value
        for side, pair in zip(SIDES, alignment.matrices, strict=True)
        for kind, value in zip(("weight", "bias"), pair, strict=True)
    }  # fmt: skip
    settings = json.loads((source / MODEL_NAME).read_text(encoding="utf-8"))
    retrieval = recipe.tasks.retrieval
    settings.setdefault("tasks", {})["retrieval"] = {
        "align": True, "embedding_width": retrieval.embedding_width, "pooling": retrieval.pooling,
    }  # fmt: skip
    origin = json.loads((source / ORIGIN_NAME).read_text(encoding="utf-8"))
    fresh = [name for name in weights if name not in origin["tensors"]]
    origin["tensors"] |= {name: _entry("first values") for name in fresh}
    origin["tensors"] |= {name: _entry("measured by launch/align.py") for name in measured}
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
