"""How much faster captions are generated with the key/value cache than without, for the same tokens.

    python benchmarks/generate.py [--recipe TOML] [--batch 8] [--max-tokens 64] [--repeats 10] [--ways ...] [--json F]

Random weights and random pictures of 64 to 256 vision tokens, a whole batch together. Without the cache, every token
takes a forward over all that came before; "pictures-once" lets that forward keep the vision encoder's work. The ways
take turns, so that a busy machine slows down all of them; each writes all tokens, as if no caption ended.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.inference.generate import CachedDecoder, prompt_batch, unspeakable
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.token_search import Decoder, greedy
from dsmoe_vl.model.init import initialise
from dsmoe_vl.tasks.language import followed_by
from dsmoe_vl.tasks.registry import build_backbone

_ROOT = Path(__file__).resolve().parent.parent
_NO_END = -1  # no token has this number
VISION_TOKENS = (64, 256)  # of a prompt, least and most


class UncachedDecoder:
    """As `CachedDecoder`, but every token is predicted by a forward over the whole prompt and text."""

    def __init__(self, trained: TrainedModel, prompts: list[Segment], room: int) -> None:
        self.trained, self.prompts = trained, prompts
        self.written: list[list[int]] = [[] for _ in prompts]
        self.unspeakable = unspeakable(trained)

    def start(self) -> Tensor:
        """Logits [S, V] after the prompts."""
        whole = [followed_by(prompt, text, 0) for prompt, text in zip(self.prompts, self.written, strict=True)]
        hidden, _ = self.trained.model(prompt_batch(self.trained, whole))
        ends = np.cumsum([segment.length for segment in whole]) - 1
        return self.trained.model.head(hidden[ends]).masked_fill(self.unspeakable, float("-inf"))

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64 [S]: logits [S, V] after them."""
        for text, token in zip(self.written, tokens.tolist(), strict=True):
            text.append(token)
        return self.start()

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences `rows`, int64 [S'], of the present ones."""
        self.prompts = [self.prompts[row] for row in rows.tolist()]
        self.written = [list(self.written[row]) for row in rows.tolist()]


class PicturesOnceDecoder(UncachedDecoder):
    """As `UncachedDecoder`, but pictures go through the vision encoder once."""

    def __init__(self, trained: TrainedModel, prompts: list[Segment], room: int) -> None:
        super().__init__(trained, prompts, room)
        (embedded,) = trained.model._embed_pictures(prompt_batch(trained, prompts))
        self.seen = embedded.split([prompt.length for prompt in prompts])

    def start(self) -> Tensor:
        """As `UncachedDecoder.start`."""
        model = self.trained.model
        parts = []
        for seen, text in zip(self.seen, self.written, strict=True):
            parts += [seen, seen.new_zeros(len(text), seen.shape[-1])]
        placed = torch.cat(parts)
        model._embed_pictures = lambda _: [placed]  # type: ignore[method-assign]
        try:
            return super().start()
        finally:
            del model._embed_pictures


WAYS: dict[str, Callable[..., Decoder]] = {
    "cached": CachedDecoder,
    "uncached": UncachedDecoder,
    "pictures-once": PicturesOnceDecoder,
}


def random_model(recipe_file: Path, tokenizer: Path | None) -> TrainedModel:
    """A model of a recipe with its first values, and the recipe's tokenizer unless another is given."""
    recipe = load_recipe(recipe_file)
    model = build_backbone(recipe).eval()
    initialise(model, seed=1)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # else all logits are near zero, and texts follow rounding errors
    return TrainedModel(model, Tokenizer(tokenizer or recipe.tokenizer.path), recipe, _ROOT, torch.device("cpu"))


def random_prompts(trained: TrainedModel, count: int, seed: int = 0) -> list[Segment]:
    """Prompts of one random picture each, whose vision tokens are spread evenly over VISION_TOKENS."""
    rng, vision = np.random.default_rng(seed), trained.recipe.model.vision
    prompts = []
    for wanted in np.linspace(*VISION_TOKENS, count):
        rows = int(wanted**0.5)
        columns = round(wanted / rows)
        cells, grid = rows * columns, (rows * vision.merge, columns * vision.merge)
        patches = rng.integers(0, 256, (cells * vision.merge**2, 3 * vision.patch_size**2), dtype=np.uint8)
        picture = Picture(patches, grid, -1.0, np.arange(cells, dtype=np.int32))
        tokens = np.full(cells + 1, trained.tokenizer.control("<image>"), np.int32)
        tokens[-1] = trained.tokenizer.control("<caption>")
        modality = np.where(np.arange(cells + 1) < cells, Modality.IMAGE, Modality.TEXT).astype(np.int32)
        prompts.append(Segment(task_number("caption"), tokens, np.full_like(tokens, IGNORE), modality, [picture]))
    return prompts


def measure(
    trained: TrainedModel, prompts: list[Segment], ways: list[str], max_tokens: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each way and repeat. The tokens of all ways are equal, or this raises."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected: list[list[int]] | None = None
    for turn in range(repeats + 1):
        for name in ways:
            start = time.perf_counter()
            with torch.inference_mode():
                tokens = greedy(WAYS[name](trained, prompts, max_tokens), _NO_END, max_tokens)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
            expected = tokens if expected is None else expected
            if tokens != expected:
                raise SystemExit(f"{name} wrote other tokens than the others")
    return seconds


def main() -> int:
    """Print seconds, tokens a second and ratios, turn by turn: median, least and most."""
    parser = argparse.ArgumentParser(description="Captions with and without the key/value cache.")
    parser.add_argument("--recipe", type=Path, default=_ROOT / "launch" / "recipes" / "quickstart.toml")
    parser.add_argument("--tokenizer", type=Path, help="default: the recipe's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:], help="beside the cached one"
    )
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    args = parser.parse_args()
    trained = random_model(args.recipe, args.tokenizer)
    prompts = random_prompts(trained, args.batch)
    vision = [prompt.length - 1 for prompt in prompts]
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    print(
        f"{parameters / 1e6:.1f} M parameters, {args.batch} prompts of {min(vision)} to {max(vision)} vision tokens, "
        f"{args.max_tokens} new tokens each, {torch.get_num_threads()} threads, {args.repeats} repeats"
    )
    seconds = measure(trained, prompts, ["cached", *args.ways], args.max_tokens, args.repeats)
    written = args.batch * args.max_tokens
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"  {name:<13} {median:7.3f} s ({min(values):.3f} to {max(values):.3f})  {written / median:7.0f} tokens/s"
        )
    ratios = {}
    for name in list(seconds)[1:]:
        found = [slow / fast for slow, fast in zip(seconds[name], seconds["cached"], strict=True)]
        ratios[name] = {"median": statistics.median(found), "least": min(found), "most": max(found)}
        print(f"  {name} / cached: {ratios[name]['median']:.1f} ({min(found):.1f} to {max(found):.1f})")
    if args.json:
        from record import Result  # here, because a test imports this file as benchmarks.generate

        figures = {
            "recipe": args.recipe.stem, "parameters": parameters, "batch": args.batch, "max_tokens": args.max_tokens,
            "vision_tokens": [min(vision), max(vision)], "threads": torch.get_num_threads(), "repeats": args.repeats,
            "seconds": seconds, "ratios": ratios,
        }  # fmt: skip
        Result.now("generate", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
