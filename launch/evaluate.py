"""Score a trained model: `python launch/evaluate.py --run runs/NAME [--data SHARDS ...] [--tasks TASK ...]`.

For every folder of shards (the recipe's held-out sources unless told otherwise) and every task that the model has
learned: captions and video summaries are generated and some of them printed next to their references, texts and
pictures are searched with each other. Where samples carry the truth, as synthetic ones do, it counts the captions that
name the colour and shape of every object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image

from data_tools.contact_sheet import Cell, contact_sheet
from dsmoe_vl.checkpoint.store import write_json
from dsmoe_vl.config.recipe import learned_tasks
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.segment import Sample
from dsmoe_vl.data.shards import VIDEO_EXTENSIONS, iterate_samples
from dsmoe_vl.errors import ConfigError, DsmoeVlError
from dsmoe_vl.evaluation.captions import Captioned, caption_samples
from dsmoe_vl.evaluation.retrieval import evaluate_retrieval
from dsmoe_vl.evaluation.summaries import Summarized, mean_scores, summarize_samples
from dsmoe_vl.inference.load import TrainedModel, load_run
from dsmoe_vl.tasks.caption import captions_of

Scores = dict[str, float]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a trained model on shards.")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument(
        "--data", nargs="+", default=[], help="folders of shards, or URLs of such; default: the held-out sources"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=["caption", "retrieval", "summary"], help="default: all that it has learned"
    )
    parser.add_argument("--limit", type=int, default=None, help="samples of each folder at most")
    parser.add_argument("--gallery", type=int, default=200, help="different samples to search among (%(default)s)")
    parser.add_argument("--show", type=int, default=6, help="captions of each folder to show")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser.parse_args()


def evaluate(args: argparse.Namespace) -> dict[str, dict[str, Scores]]:
    """Scores by folder and task. Raises DsmoeVlError."""
    trained = load_run(args.run, args.device)
    learned = learned_tasks(trained.recipe)
    for task in args.tasks or []:
        if task not in learned:
            raise ConfigError(f"--tasks {task}: {args.run} has learned {', '.join(learned)}")
    folders: list[str] = args.data or [source.path for source in trained.recipe.data.evaluation]
    # The cache of the run; but its plan may come from somebody else, so only a command that is given here is run.
    data = replace(trained.recipe.data, allow_pipe=bool(args.data))
    print(f"{trained.checkpoint}")
    scores: dict[str, dict[str, Scores]] = {}
    shown: list[Captioned] = []
    for folder in folders:
        scores[folder] = found = {}
        for task in args.tasks or learned:
            samples = islice(iterate_samples(folder, folder.rstrip("/").rpartition("/")[2], data=data), args.limit)
            if task == "caption":
                found[task] = caption_scores(trained, samples, args, shown)
            elif task == "retrieval":
                found[task] = evaluate_retrieval(trained, samples, args.gallery)
            elif videos := list(summarize_samples(trained, samples, args.max_tokens)):
                found[task] = mean_scores(videos)
                show_summaries(videos[: args.show])
        for task, values in found.items():
            print(f"{folder}: {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    if shown:
        sheet = args.run / "samples" / "captions.png"
        sheet.parent.mkdir(exist_ok=True)
        contact_sheet([Cell(pictures(result.sample), result.generated) for result in shown]).save(sheet)
        print(f"wrote {sheet}")
    return scores


def caption_scores(
    trained: TrainedModel, samples: Iterator[Sample], args: argparse.Namespace, shown: list[Captioned]
) -> Scores:
    """Caption everything, print the first ones and add them to `shown`."""
    count, judged = 0, []
    for result in caption_samples(trained, samples, args.max_tokens):
        if count < args.show:
            shown.append(result)
            show(result.sample, result.generated, captions_of(result.sample)[0])
        count += 1
        if result.correct is not None:
            judged.append(result.correct)
    scores: Scores = {"samples": count}
    if judged:
        scores |= {"with_truth": len(judged), "correct": sum(judged), "attribute_accuracy": sum(judged) / len(judged)}
        right = f"{sum(judged)} of {len(judged)} captions name every object's colour and shape"
        print(f"{right} ({scores['attribute_accuracy']:.1%})")
    return scores


def show_summaries(videos: list[Summarized]) -> None:
    """Print generated summaries, and the most important moment."""
    for video in videos:
        summary = video.summary
        peak = summary.seconds[summary.importance.argmax()]
        show(video.sample, f"{summary.text} (peak at {peak:.2f} s)", str(video.sample.meta.get("summary", "")))


def show(sample: Sample, generated: str, reference: str) -> None:
    """A text next to its reference."""
    print(f"  {sample.key}\n    generated  {generated}\n    reference  {reference}")


def pictures(sample: Sample) -> list[Image.Image]:
    """The image, or some frames of the video."""
    assert sample.media is not None, "it has been captioned"
    if sample.media_type in VIDEO_EXTENSIONS:
        return [Image.fromarray(frame) for _, frame in decode_video(sample.media, 4)]
    return [Image.fromarray(decode_image(sample.media))]


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
