"""Score a trained model: `python launch/evaluate.py --run runs/NAME [--data SHARDS ...]`.

Generates a caption for every sample of the shards (the recipe's held-out sources unless told otherwise), prints some
next to their references, and, where the samples carry the truth, how many captions name every object's colour and shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

from dsmoe_vl.checkpoint.store import write_json
from dsmoe_vl.data.shards import iterate_samples
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.evaluation.captions import Captioned, caption_samples
from dsmoe_vl.inference.load import load_run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a trained model on shards.")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders of shards; default: the held-out sources"
    )
    parser.add_argument("--limit", type=int, default=None, help="samples of each folder at most")
    parser.add_argument("--show", type=int, default=4, help="captions of each folder to print")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a caption at most")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser.parse_args()


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores by folder. Raises DsmoeVlError."""
    trained = load_run(args.run, args.device)
    folders = args.data or [Path(source.path) for source in trained.recipe.data.evaluation]
    print(f"{trained.checkpoint}")
    scores: dict[str, dict[str, float]] = {}
    for folder in folders:
        started = time.monotonic()
        samples = islice(iterate_samples(folder, folder.name), args.limit)
        results = list(caption_samples(trained, samples, args.max_tokens))
        scores[str(folder)] = score(results)
        print(f"\n{folder}: {len(results)} samples in {time.monotonic() - started:.1f} s")
        for result in results[: args.show]:
            print(f"  {result.key}\n    generated  {result.generated}\n    reference  {result.references[0]}")
        if "attribute_accuracy" in scores[str(folder)]:
            right, known = (int(scores[str(folder)][name]) for name in ("correct", "with_truth"))
            print(
                f"  {right} of {known} captions name the right colour and shape of every object ({right / known:.1%})"
            )
    return scores


def score(results: list[Captioned]) -> dict[str, float]:
    """Counts, and the share of captions that name every object where the truth is known."""
    judged = [result.correct for result in results if result.correct is not None]
    scores: dict[str, float] = {"samples": len(results)}
    if judged:
        scores |= {"with_truth": len(judged), "correct": sum(judged), "attribute_accuracy": sum(judged) / len(judged)}
    return scores


def main() -> int:
    """Exit status 2 where the run or the shards cannot be used."""
    args = parse()
    try:
        scores = evaluate(args)
    except DsmoeVlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(args.run / "eval.json", scores)
    print(f"\nwrote {args.run / 'eval.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
