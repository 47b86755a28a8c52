"""Import other makers' weights: `python launch/import_hf.py [--text DIR] [--vision DIR] [--whole DIR] --output DIR`.

DIR is a folder as transformers' `save_pretrained` writes it: config.json and safetensors files. Nothing in it is run,
and nothing is downloaded. Training starts from the output with `model.init_from = "OUTPUT"` in the recipe, whose shapes
follow from it.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from dsmoe_vl.command import leave, run
from dsmoe_vl.pretrained.importing import import_models
from dsmoe_vl.pretrained.upcycling import Upcycling

_OF_TOWER = (
    ", by the defaults of [model.vision]: for a smaller encoder set width, layers, heads and ffn_width there, or "
    "import one with --vision DIR"
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Import weights of a language model and a vision encoder.")
    parser.add_argument("--text", type=Path, metavar="DIR", help="a language model: Qwen3(-MoE), Llama, Mixtral, ...")
    parser.add_argument("--vision", type=Path, metavar="DIR", help="a vision encoder: SigLIP, CLIP, DINOv2, ...")
    parser.add_argument("--whole", type=Path, metavar="DIR", help="both with their connector: Qwen3-VL, InternVL, ...")
    parser.add_argument(
        "--controls", nargs="+", default=[], metavar="NAME=PIECE", help="reserved pieces for symbols, as image=[IMG]"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--probe", action="store_true", help="ask transformers for what training compares at its start")
    dense = parser.add_argument_group("a dense language model becomes sparse")
    for option in fields(Upcycling):
        name, words = f"--{option.name.replace('_', '-')}", option.metadata["help"]
        dense.add_argument(name, type=type(option.default), default=option.default, metavar="N", help=words)
    return parser.parse_args()


def main() -> int:
    """Print what was imported. Exit status 2 if a folder cannot be used."""
    args = parse()
    return run(lambda: import_and_show(args))


def import_and_show(args: argparse.Namespace) -> int:
    """Import, and print a summary. Raises DsmoeVlError."""
    how = Upcycling(**{option.name: getattr(args, option.name) for option in fields(Upcycling)})
    controls = dict(pair.partition("=")[::2] for pair in args.controls)
    experts = how if how.experts else None
    done = import_models(
        args.text, args.vision, args.output, whole=args.whole, experts=experts, controls=controls, probe=args.probe
    )
    for part, count in done.parameters.items():
        print(f"  {part:<12} {count:>15,} parameters imported")
    for part, count in done.fresh.items():
        print(f"  {part:<12} {count:>15,} parameters get first values{_OF_TOWER * (part == 'vision')}")
    if done.tokenizer is not None:
        print(f"  tokenizer    {done.tokenizer}")
        if done.tokenizer.unread:
            print(f"warning: {done.tokenizer.unread}")
    elif language := args.text or args.whole:
        print(
            f"warning: {language} has neither tokenizer.model nor tokenizer.json: the rows of its embedding are "
            "pieces of a tokenizer that is not there; with another one they mean other pieces, and only the layers are "
            "of use"
        )
    if done.settings.get("model", {}).get("rope_sections"):
        print("  videos       frames have positions as still images one after another, without timestamps between them")
    print(f'wrote {args.output}; in the recipe: model.init_from = "{args.output}"')
    return 0


if __name__ == "__main__":
    leave(main())
