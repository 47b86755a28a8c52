"""Score a trained model: `python launch/evaluate.py --run runs/NAME [--data SHARDS ...]`.

Generates a caption for every sample of the shards (the recipe's held-out sources unless told otherwise) and prints some
of them next to their references. Where samples carry the truth, as synthetic ones do, it counts the captions that name
the colour and shape of every object.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

from PIL import Image

from data_tools.contact_sheet import Cell, contact_sheet
from dsmoe_vl.checkpoint.store import write_json
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.segment import Sample
from dsmoe_vl.data.shards import VIDEO_EXTENSIONS, iterate_samples
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.evaluation.captions import Captioned, caption_samples
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.tasks.caption import captions_of


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a trained model on shards.")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="folders of shards; default: the held-out sources"
    )
    parser.add_argument("--limit", type=int, default=None, help="samples of each folder at most")
    parser.add_argument("--show", type=int, default=6, help="captions of each folder to show")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a caption at most")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser.parse_args()


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores by folder. Raises DsmoeVlError."""
    trained = load_run(args.run, args.device)
    folders = args.data or [Path(source.path) for source in trained.recipe.data.evaluation]
    print(f"{trained.checkpoint}")
    scores: dict[str, dict[str, float]] = {}
    shown: list[Captioned] = []
    for folder in folders:
        started = time.monotonic()
        samples = islice(iterate_samples(folder, folder.name), args.limit)
        count, judged = 0, []
        for result in caption_samples(trained, samples, args.max_tokens):
            if count < args.show:
                shown.append(result)
                print(f"  {result.sample.key}")
                print(f"    generated  {result.generated}\n    reference  {captions_of(result.sample)[0]}")
            count += 1
            if result.correct is not None:
                judged.append(result.correct)
        scores[str(folder)] = {"samples": count}
        print(f"{folder}: {count} samples in {time.monotonic() - started:.1f} s")
        if judged:
            share = sum(judged) / len(judged)
            scores[str(folder)] |= {"with_truth": len(judged), "correct": sum(judged), "attribute_accuracy": share}
            print(
                f"{folder}: {sum(judged)} of {len(judged)} captions name every object's colour and shape ({share:.1%})"
            )
    if shown:
        sheet = args.run / "samples" / "captions.png"
        sheet.parent.mkdir(exist_ok=True)
        contact_sheet([Cell(pictures(result.sample), result.generated) for result in shown]).save(sheet)
        print(f"wrote {sheet}")
    return scores


def pictures(sample: Sample) -> list[Image.Image]:
    """The image, or some frames of the video."""
    assert sample.media is not None, "it has been captioned"
    if sample.media_type in VIDEO_EXTENSIONS:
        return [frame for _, frame in decode_video(sample.media, 4)]
    return [decode_image(sample.media)]


def main() -> int:
    """Exit status 2 where the run or the shards cannot be used."""
    args = parse()
    try:
        scores = evaluate(args)
    except DsmoeVlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(args.run / "eval.json", scores)
    print(f"wrote {args.run / 'eval.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
