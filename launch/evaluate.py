"""Score a trained model: `python launch/evaluate.py --run runs/NAME [--data SHARDS ...] [--tasks TASK ...]`.

For every folder of shards (the recipe's held-out sources unless told otherwise) and every task that the model has
learned: captions and video summaries are generated and some of them printed next to their references, texts and
pictures are searched with each other. Where samples carry the truth, as synthetic ones do, it counts the captions that
name the colour and shape of every object. Against the references it computes BLEU, ROUGE-L and CIDEr-D.

Several ranks share the samples and give the same scores: `deepspeed launch/evaluate.py --run runs/NAME ...`, or
torchrun, mpirun or srun. They are printed, and written to eval.json and tensorboard/eval in the run's directory; beside
them, report.html shows them with examples and with the load of the experts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

# Torch reads it when imported. Without it every rank prints a C++ stack for a connection that another one has closed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from PIL import Image

from dsmoe_vl.checkpoint.store import read_manifest
from dsmoe_vl.config.recipe import learned_tasks
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.segment import Sample
from dsmoe_vl.data.shards.index import VIDEO_EXTENSIONS, iterate_samples
from dsmoe_vl.errors import CheckpointError, ConfigError, DsmoeVlError
from dsmoe_vl.evaluation.captions import Captioned, caption_samples, text_scores
from dsmoe_vl.evaluation.dealing import Dealer, Dealt
from dsmoe_vl.evaluation.examples import Counts, Gatherer
from dsmoe_vl.evaluation.expert_load import LoadCounter, total_load
from dsmoe_vl.evaluation.retrieval import evaluate_retrieval
from dsmoe_vl.evaluation.scalars import write_scalars
from dsmoe_vl.evaluation.summaries import Summarized, mean_scores, summarize_samples
from dsmoe_vl.files import write_json
from dsmoe_vl.inference.contact_sheet import Cell, contact_sheet
from dsmoe_vl.inference.load import TrainedModel, load_run
from dsmoe_vl.parallel.device import device_name, use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.report.content import FolderExamples, Report
from dsmoe_vl.report.page import render
from dsmoe_vl.tasks.caption import captions_of

Scores = dict[str, float]
Result = TypeVar("Result", Captioned, Summarized)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a trained model on shards.")
    # torchrun takes --run for the beginning of an option of its own, even behind the script.
    parser.add_argument("--run", "--run-dir", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument(
        "--data", nargs="+", default=[], help="folders of shards, or URLs of such; default: the held-out sources"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=["caption", "retrieval", "summary"], help="default: all that it has learned"
    )
    parser.add_argument("--limit", type=int, default=None, help="samples of each folder at most")
    parser.add_argument(
        "--gallery",
        type=int,
        default=200,
        help="different samples to search among (%(default)s); with 5000, COCO's folds",
    )
    parser.add_argument("--show", type=int, default=6, help="captions of each folder to show")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (on several ranks, one each) or cuda:N")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def evaluate(
    args: argparse.Namespace, trained: TrainedModel, dealer: Dealer
) -> tuple[dict[str, dict[str, Scores]], dict[str, FolderExamples]]:
    """Scores by folder and task, the same on every rank, and by folder what to show. Raises DsmoeVlError."""
    learned = learned_tasks(trained.recipe)
    for task in args.tasks or []:
        if task not in learned:
            raise ConfigError(f"--tasks {task}: {args.run} has learned {', '.join(learned)}")
    folders: list[str] = args.data or [source.path for source in trained.recipe.data.evaluation]
    # The cache of the run; but its plan may come from somebody else, so only a command that is given here is run.
    data = replace(trained.recipe.data, allow_pipe=bool(args.data))
    print(f"{trained.checkpoint}")
    scores: dict[str, dict[str, Scores]] = {}
    examples: dict[str, FolderExamples] = {}
    shown: list[Captioned] = []
    for folder in folders:
        scores[folder] = found = {}
        gatherer = Gatherer(data, Counts.of(len(folders)))
        for task in args.tasks or learned:
            name = folder.rstrip("/").rpartition("/")[2]
            own = iterate_samples(folder, name, data=data, first=dealer.rank, step=dealer.count)
            samples = Dealt(islice(own, None if args.limit is None else dealer.own(args.limit)), dealer)
            if task == "caption":
                captioned = gatherer.captions(caption_samples(trained, samples, args.max_tokens))
                found[task] = caption_scores(together(captioned, samples, dealer, args.show), args, shown)
            elif task == "retrieval":
                again = islice(iterate_samples(folder, name, data=data), args.limit)
                keep = partial(gatherer.retrieval, samples=again) if dealer.rank == 0 else None
                found[task] = evaluate_retrieval(trained, samples, args.gallery, dealer, keep=keep)
            else:
                summarized = gatherer.summaries(summarize_samples(trained, samples, args.max_tokens))
                if videos := together(summarized, samples, dealer):
                    found[task] = mean_scores(videos) | text_scores(
                        (video.summary.text, [str(video.sample.meta.get("summary", ""))]) for video in videos
                    )
                    show_summaries(videos[: args.show])
        examples[folder] = gatherer.gathered(dealer)
        for task, values in found.items():
            print(f"{folder}: {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    if shown and dealer.rank == 0:
        sheet = args.run / "samples" / "captions.png"
        sheet.parent.mkdir(exist_ok=True)
        contact_sheet([Cell(pictures(result.sample), result.generated) for result in shown]).save(sheet)
        print(f"wrote {sheet}")
    return scores, examples


def together(found: Iterable[Result], samples: Dealt, dealer: Dealer, whole: int = 0) -> list[Result]:
    """The results of all ranks in the order of their samples. Of these only the first `whole` keep picture or video,
    to be shown: all would not fit into memory. Collective."""
    own: list[tuple[int, Result]] = []
    for result in found:
        sample, number = result.sample, samples.number(result.sample)
        kept = sample if len(own) < whole else replace(sample, media=None)
        own.append((number, replace(result, sample=kept)))
    return dealer.merge(own)


def caption_scores(results: list[Captioned], args: argparse.Namespace, shown: list[Captioned]) -> Scores:
    """Print the first captions and add them to `shown`; count the right ones."""
    for result in results[: args.show]:
        shown.append(result)
        show(result.sample, result.generated, captions_of(result.sample)[0])
    judged = [result.correct for result in results if result.correct is not None]
    scores: Scores = {"samples": len(results)}
    if judged:
        scores |= {"with_truth": len(judged), "correct": sum(judged), "attribute_accuracy": sum(judged) / len(judged)}
        right = f"{sum(judged)} of {len(judged)} captions name every object's colour and shape"
        print(f"{right} ({scores['attribute_accuracy']:.1%})")
    return scores | text_scores((result.generated, captions_of(result.sample)) for result in results)


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
    """Exit status 2 where the run or the shards cannot be used; whatever happens on one rank, every rank ends."""
    args = parse()
    ranks = Ranks(0, 1, 0)
    try:
        ranks = Ranks.discover()
        if ranks.world_size == 1:
            evaluate_and_write(args, Dealer())
        else:
            evaluate_on_ranks(args, ranks)
    except BaseException as error:
        if ranks.world_size > 1:
            from dsmoe_vl.parallel.launch import report_failure

            report_failure(error, ranks)
            os._exit(2 if isinstance(error, DsmoeVlError) else 1)
        if not isinstance(error, DsmoeVlError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate_on_ranks(args: argparse.Namespace, ranks: Ranks) -> None:
    """One rank's part. Rank 0 alone prints and writes."""
    import logging

    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    os.environ["DS_ACCELERATOR"] = kind  # DeepSpeed reads it when imported
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import torch.distributed as dist

    from dsmoe_vl.parallel.launch import HostGroup, start_process_group

    device = use_device(device_name(), ranks.local_rank)
    if args.device == "cuda":
        args.device = str(device)
    start_process_group(ranks, kind)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if ranks.rank == 0 else nowhere):
        group = HostGroup()
        evaluate_and_write(args, Dealer(ranks, group))
        group.barrier()  # a rank whose peers are still connected, or that is, may abort as it ends
        dist.destroy_process_group()


def evaluate_and_write(args: argparse.Namespace, dealer: Dealer) -> None:
    """Everything: scores to the terminal, eval.json and TensorBoard, and the report. Raises DsmoeVlError."""
    trained = load_run(args.run, args.device)
    manifest = read_manifest(trained.checkpoint)
    if manifest is None or len(set(dealer.gather(manifest.step))) > 1:
        raise CheckpointError(f"{args.run} got a new checkpoint just now: start again")
    counter = LoadCounter(trained.recipe)
    with counter.watching(trained.model.layers):
        scores, examples = evaluate(args, trained, dealer)
    load = total_load(dealer.gather(counter.load()))
    if dealer.rank == 0:
        write_json(args.run / "eval.json", scores)
        write_scalars(args.run / "tensorboard" / "eval", manifest.step, scores)
        plan = json.loads((args.run / "plan.json").read_text(encoding="utf-8"))
        report = Report(args.run.resolve().name, manifest.step, scores, examples, load, plan)
        (args.run / "report.html").write_text(render(report), encoding="utf-8")
        print(f"wrote {args.run / 'eval.json'} and {args.run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
