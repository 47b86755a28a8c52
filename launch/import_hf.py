"""Import other makers' weights: `python launch/import_hf.py [--text DIR] [--vision DIR] --output DIR`.

DIR is a folder as transformers' `save_pretrained` writes it: config.json and safetensors files. Nothing in it is run,
and nothing is downloaded. Training starts from the output with `model.init_from = "OUTPUT"` in the recipe, whose shapes
follow from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsmoe_vl.command import run
from dsmoe_vl.pretrained.importing import import_models


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Import weights of a language model, a vision encoder, or both.")
    parser.add_argument("--text", type=Path, metavar="DIR", help="a language model: Qwen3(-MoE), Llama, Mixtral, ...")
    parser.add_argument("--vision", type=Path, metavar="DIR", help="a vision encoder: SigLIP, CLIP, DINOv2, ...")
    parser.add_argument(
        "--controls", nargs="+", default=[], metavar="NAME=PIECE", help="reserved pieces for symbols, as image=[IMG]"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser.parse_args()


def main() -> int:
    """Print what was imported. Exit status 2 if a folder cannot be used."""
    args = parse()
    return run(lambda: import_and_show(args))


def import_and_show(args: argparse.Namespace) -> int:
    """Import, and print a summary. Raises DsmoeVlError."""
    controls = dict(pair.partition("=")[::2] for pair in args.controls)
    done = import_models(args.text, args.vision, args.output, controls)
    for part, count in done.parameters.items():
        print(f"  {part:<12} {count:>15,} parameters imported")
    parts = ", ".join(sorted({name.split(".")[0] for name in done.fresh}))
    print(f"  {len(done.fresh)} tensors get first values, in {parts}")
    if done.tokenizer is not None:
        print(f"  tokenizer    {done.tokenizer}")
    elif args.text is not None:
        print(
            f"warning: {args.text} has neither tokenizer.model nor tokenizer.json: the rows of its embedding are "
            "pieces of a tokenizer that is not there; with another one they mean other pieces, and only the layers are "
            "of use"
        )
    print(f'wrote {args.output}; in the recipe: model.init_from = "{args.output}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
