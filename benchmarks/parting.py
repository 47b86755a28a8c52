"""How experts part that begin as copies of one feed-forward: their mean pairwise cosine over the steps of training.

    python benchmarks/parting.py [--seeds 1 2] [--steps 250] [--plot FILE] [--json FILE]

A tiny dense decoder learns texts of several made-up languages, then becomes sparse as `launch/import_hf.py --experts 8
--top-k 2` makes it, in several ways, and learns on. A language is a table of which piece follows which. The loss is
that of held-out texts. Takes less than two minutes on one core. The plot needs matplotlib (the extra "compare").
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import Result
from safetensors.torch import save_file
from torch import Tensor

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.model import ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.balance import load_balance_loss, router_z_loss
from dsmoe_vl.pretrained.decoder import Decoder
from dsmoe_vl.pretrained.importing import import_models
from dsmoe_vl.pretrained.upcycling import Upcycling
from dsmoe_vl.tasks.registry import build_backbone

WAYS: dict[str, dict[str, float]] = {
    "copies": {},
    "noise 0.01": {"noise": 0.01},
    "noise 0.1": {"noise": 0.1},
    "fresh share 0.5": {"fresh_share": 0.5},
}
_EXPERTS, _TOP_K = 8, 2
_VISION = VisionConfig(patch_size=2, merge=2, width=8, layers=1, heads=2, ffn_width=8)  # never used
_MODEL = ModelConfig(width=64, layers=2, heads=4, kv_heads=4, ffn_width=128, qk_norm="none", vision=_VISION)
_PIECES, _LANGUAGES, _FOLLOWERS = 64, 8, 3  # a piece has so many that may follow it
_TEXTS, _LENGTH = 32, 24  # of a batch; pieces of a text
_BALANCE, _Z = 0.01, 0.001  # the recipe's defaults
_RATE = 2e-3
_POINTS = 10

Point = dict[str, float]


class Texts:
    """Batches of texts, each in one of the languages: int64 [_TEXTS, _LENGTH + 1]."""

    def __init__(self, seed: int) -> None:
        self._tables = np.random.default_rng(0).integers(0, _PIECES, (_LANGUAGES, _PIECES, _FOLLOWERS))
        self._noise = np.random.default_rng(seed)

    def batch(self) -> Tensor:
        """The next one."""
        language = self._noise.integers(0, _LANGUAGES, _TEXTS)
        pieces = [self._noise.integers(0, _PIECES, _TEXTS)]
        for _ in range(_LENGTH):
            pieces.append(self._tables[language, pieces[-1], self._noise.integers(0, _FOLLOWERS, _TEXTS)])
        return torch.from_numpy(np.stack(pieces, 1))


def losses(model: VisionLanguageModel, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Of the next piece, nats, and with the balance and z losses of the sparse layers."""
    inputs, targets = texts[:, :-1].int().numpy(), texts[:, 1:].flatten()
    segments = [Segment(0, text, text, 0 * text, []) for text in inputs]
    patches = _VISION.merge**2
    hidden, stats = model(collate([assemble(segments, PackShape(inputs.size, patches, 2, _VISION.merge))]))
    loss = model.head(hidden, targets) / len(targets)
    if stats is None:
        return loss, loss
    load, probability = (values.sum((1, 2)).unsqueeze(1) for values in (stats.load, stats.probability_sum))
    balance = load_balance_loss(probability, load / load.sum(-1, keepdim=True), len(targets))
    return loss, loss + _BALANCE * balance + _Z * router_z_loss(stats.z_sum, len(targets))


def train(model: VisionLanguageModel, steps: int, seed: int) -> Iterator[int]:
    """Yields the number of steps before the first and at every point."""
    texts, optimizer = Texts(seed), torch.optim.AdamW(model.parameters(), _RATE)
    for step in range(steps + 1):
        if step % max(1, steps // _POINTS) == 0 or step == steps:
            yield step
        optimizer.zero_grad()
        losses(model, texts.batch())[1].backward()
        optimizer.step()


@torch.no_grad()
def held_out(model: VisionLanguageModel) -> float:
    """The loss of texts that no training has."""
    texts = Texts(10**6)
    return statistics.fmean(losses(model, texts.batch())[0].item() for _ in range(4))


@torch.no_grad()
def mean_cosine(model: VisionLanguageModel) -> float:
    """Of every two experts of a layer, all their weights in one row; the mean over layers."""
    found = []
    for layer in model.layers:
        experts = layer.feed_forward.experts
        rows = torch.cat([experts.w1.flatten(1), experts.w2.flatten(1), experts.w3.flatten(1)], dim=1)
        rows = rows / rows.norm(dim=1, keepdim=True)
        found.append(((rows @ rows.t()).sum() - len(rows)).item() / (len(rows) * (len(rows) - 1)))
    return statistics.fmean(found)


def write_dense(folder: Path, steps: int, seed: int) -> float:
    """A trained dense model as a folder of Llama's; its loss."""
    moe, words = MoEConfig(first_dense_layers=_MODEL.layers), TokenizerConfig(vocab_size=_PIECES)
    model = build_backbone(Recipe(model=_MODEL, moe=moe, tokenizer=words))
    initialise(model, seed)
    for _ in train(model, steps, seed):
        pass
    decoder = Decoder(_MODEL, None, _PIECES, _MODEL.layers, "llama")
    values = dict(model.named_parameters())
    parts = [part for target in decoder.targets() for part in target.parts(values[target.name].detach())]
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in parts}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(decoder.config(_LENGTH)))
    return held_out(model)


def part(dense: Path, output: Path, way: str, steps: int, seed: int) -> list[Point]:
    """The curve of one way."""
    how = replace(Upcycling(experts=_EXPERTS, top_k=_TOP_K, seed=seed), **WAYS[way])
    import_models(dense, None, output, experts=how)
    (output / "recipe.toml").write_text(f'[model]\ninit_from = "{output}"\n')
    recipe = load_recipe(output / "recipe.toml")
    model = build_backbone(replace(recipe, model=replace(recipe.model, vision=_VISION)))
    initialise(model, seed)
    model.load_state_dict(WeightsFile(output).load(), strict=False)
    return [
        {"step": step, "cosine": mean_cosine(model), "loss": held_out(model)} for step in train(model, steps, seed + 1)
    ]


def draw(curves: dict[str, list[list[Point]]], dense: float, file: Path) -> None:
    """Means and ranges of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.8, 3.5), dpi=110)
    for axes, value, title in ((left, "cosine", "mean cosine of two experts"), (right, "loss", "held-out loss, nats")):
        for way, seeds in curves.items():
            at = [point["step"] for point in seeds[0]]
            values = [[point[value] for point in points] for points in zip(*seeds, strict=True)]
            (line,) = axes.plot(at, [statistics.fmean(v) for v in values], marker="o", ms=3, label=way)
            axes.fill_between(at, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.2)
        axes.set_xlabel("steps after the dense model became sparse")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    right.axhline(dense, color="grey", linestyle="--", label="the dense model, before")
    right.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of the dense model, and of each sparse one")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves, such as to docs/images/parting.png")
    parser.add_argument("--json", type=Path, help="the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[list[Point]]] = {way: [] for way in WAYS}
    dense = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            dense.append(write_dense(folder / "dense", args.steps, seed))
            for way in WAYS:
                points = part(folder / "dense", folder / way.replace(" ", "_"), way, args.steps, seed)
                curves[way].append(points)
                first, last = points[0], points[-1]
                print(
                    f"seed {seed}, {way}: cosine {first['cosine']:.3f} to {last['cosine']:.3f}, "
                    f"loss {first['loss']:.3f} to {last['loss']:.3f}; dense {dense[-1]:.3f}",
                    flush=True,
                )
    found: dict[str, Any] = {"experts": _EXPERTS, "top_k": _TOP_K, "seeds": args.seeds, "steps": args.steps}
    if args.plot:
        draw(curves, statistics.fmean(dense), args.plot)
    if args.json:
        Result.now("parting", found | {"dense_loss": dense, "curves": curves}).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
