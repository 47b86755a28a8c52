"""Export a trained model: `python launch/export.py --run runs/NAME --output DIR [--format hf]`.

Writes the weights, tokenizer and plan of the newest checkpoint to DIR, which the other programs accept as `--run DIR`.
Experts that the L1 term has reduced to zero output are left out; the model's outputs do not change.

With `--format hf` DIR is a folder that transformers loads with one of its own classes, or the reason why none fits;
with `--own-code` as well, it has the code of a class that fits every model.

With `--format keyedvectors --data SHARDS` DIR has the retrieval embeddings of pictures, videos and captions, as files
that gensim's KeyedVectors opens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsmoe_vl.checkpoint.export import export_run
from dsmoe_vl.command import leave, run
from dsmoe_vl.inference.commands import print_error
from dsmoe_vl.inference.keyed_vectors import describe_counts, export_keyed_vectors
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.pretrained.exporting import export_hf


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export a trained model for use.")
    parser.add_argument("--run", type=Path, required=True, help="a run directory, such as runs/quickstart")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--format", choices=("dsmoe_vl", "hf", "keyedvectors"), default="dsmoe_vl",
        help="for these programs, for transformers, or embeddings for gensim",
    )  # fmt: skip
    parser.add_argument("--data", metavar="SHARDS", help="with keyedvectors: folder or URL of shards to embed")
    parser.add_argument("--part", choices=("all", "text"), default="all", help="with hf: text is the decoder alone")
    parser.add_argument(
        "--drop-routing-bias", action="store_true", help="with hf: leave the routers' biases out; tokens change experts"
    )
    parser.add_argument(
        "--own-code", action="store_true", help="with hf: a class of ours in the folder, for trust_remote_code"
    )
    args = parser.parse_args()
    changed = args.part != "all" or args.drop_routing_bias
    if args.format != "hf" and (changed or args.own_code):
        parser.error("--part, --drop-routing-bias and --own-code need --format hf")
    if (args.format == "keyedvectors") != (args.data is not None):
        parser.error("--format keyedvectors and --data SHARDS need each other")
    if changed and args.own_code:
        parser.error("--own-code leaves nothing out: give it without --part and --drop-routing-bias")
    return args


def main() -> int:
    """Print the dropped experts and the sizes. Exit status 2 if the run or the folder cannot be used."""
    args = parse()
    if args.format == "keyedvectors":
        return run(lambda: export_embeddings(args))
    return run(lambda: export_for_transformers(args) if args.format == "hf" else export(args.run, args.output))


def export(run_dir: Path, output: Path) -> int:
    """Export, and print a summary. Returns the exit status. Raises DsmoeVlError."""
    done = export_run(run_dir, output)
    print(f"{done.checkpoint}")
    for layer in done.layers:
        print(f"  layer {layer.layer}: {layer.dropped} of {layer.experts} experts are null and dropped")
    print(f"  weights: {done.before_bytes:,} bytes before, {done.after_bytes:,} bytes after")
    print(f"wrote {output}")
    return 0


def export_for_transformers(args: argparse.Namespace) -> int:
    """As `export`, in the form of one of transformers' classes."""
    done = export_hf(args.run, args.output, args.part == "text", args.drop_routing_bias, args.own_code)
    print(f"{done.checkpoint}")
    for what in done.lost:
        print(f"  lost: {what}")
    print(f"  weights: {done.size_bytes:,} bytes")
    print(f"wrote {args.output} for transformers: {done.architecture}")
    return 0


def export_embeddings(args: argparse.Namespace) -> int:
    """Embed, and print a summary. Returns the exit status: 1 if something was left out."""
    trained = load_run(args.run, None)
    counts = export_keyed_vectors(
        trained, args.data, args.output, lambda name, reason: print_error(f"{name}: {reason}")
    )
    print(f"{trained.checkpoint}")
    describe_counts(counts)
    print(f"wrote {args.output}")
    return 1 if counts.left_out else 0


if __name__ == "__main__":
    leave(main())
