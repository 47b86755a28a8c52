"""Score a trained model: `python launch/evaluate.py --run runs/NAME [--data SHARDS ...] [--tasks TASK ...]`.

For every folder of shards (default: the recipe's held-out sources) and every learned task: generates captions and
video summaries and prints some next to their references, and scores retrieval in both directions. If KEY.json lists
`attributes`, as in synthetic samples, it counts the captions that name the colour and shape of every object. Against
the references it computes BLEU, ROUGE-L and CIDEr-D.

Several ranks split the samples and give the same scores: `deepspeed launch/evaluate.py --run runs/NAME ...`, or
torchrun, mpirun or srun. Scores are printed, and written to eval.json and tensorboard/eval in the run's directory;
report.html shows them with examples and with the load of the experts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Torch reads it when imported. Without it, every rank prints a C++ stack when another rank closes its connection.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import fraction, leave, run
from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.run import evaluate_on_ranks, evaluate_run
from dsmoe_vl.evaluation.task_evaluation import Options
from dsmoe_vl.metrics.captions import SPLITS
from dsmoe_vl.metrics.meteor_spice import CHOICES
from dsmoe_vl.parallel.ranks import Ranks


def parse() -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a trained model on shards.")
    # torchrun takes --run for an abbreviation of one of its own options, even after the script.
    parser.add_argument("--run", "--run-dir", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument(
        "--data", nargs="+", default=[], help="folders of shards, or URLs (default: the held-out sources)"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], choices=[spec.name for spec in TASKS], help="default: all learned tasks"
    )
    parser.add_argument("--limit", type=int, default=None, help="maximum samples per folder")
    parser.add_argument(
        "--gallery", type=int, default=200, help="distinct samples to search (%(default)s); 5000: COCO's folds"
    )
    parser.add_argument("--show", type=int, default=6, help="texts to print per folder (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=Options.max_tokens, help="tokens per text (%(default)s)")
    parser.add_argument(
        "--split", choices=tuple(SPLITS), default=Options.split, help="what counts as a word in scores of texts (words)"
    )
    parser.add_argument("--java", choices=CHOICES, default="", help="scores of texts by METEOR, or by SPICE as well")
    parser.add_argument(
        "--format", choices=("lmms",), help="also write the scores to RUN/lmms as lmms-eval writes its own"
    )
    parser.add_argument(
        "--max-bad-fraction", type=fraction, metavar="F", help="of a folder's samples (default: the recipe's)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda (one GPU per rank) or cuda:N")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by some launchers
    args = parser.parse_args()
    return Options(
        run=args.run,
        folders=tuple(args.data),
        tasks=tuple(args.tasks),
        limit=args.limit,
        gallery=args.gallery,
        show=args.show,
        max_tokens=args.max_tokens,
        device=args.device,
        split=args.split,
        java=args.java,
        lmms=args.format == "lmms",
        max_bad_fraction=args.max_bad_fraction,
    )


def main() -> int:
    """Exit status 2 if the run or the shards cannot be used. After an error on one rank, every rank ends."""
    options = parse()
    return run(lambda: evaluate(options))


def evaluate(options: Options) -> int:
    """Evaluate on this rank. Returns the exit status. Raises DsmoeVlError if this is the only rank."""
    ranks = Ranks.discover()
    if ranks.world_size == 1:
        evaluate_run(options, Dealer())
        return 0
    try:
        evaluate_on_ranks(options, ranks)
    except BaseException as error:
        from dsmoe_vl.parallel.process_group import end_rank

        end_rank(error, ranks)
    return 0


if __name__ == "__main__":
    leave(main())
