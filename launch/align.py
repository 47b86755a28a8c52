"""Align what retrieval starts from: `python launch/align.py --recipe FILE --output DIR [key=value ...]`.

Measures the states of retrieval on the recipe's data, with the weights of its `model.init_from`, and writes a folder to
name there instead. They fit the states of these weights: freeze what stands before the heads. One process,
on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# Torch reads it when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.command import leave, run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Align what retrieval starts from.")
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="has model.init_from")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, for model.init_from")
    parser.add_argument("--pairs", type=int, default=4000, metavar="N", help="to measure on; 4000 by default")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    return parser.parse_intermixed_args()


def main() -> int:
    """Exit status 2 for a user's error."""
    args = parse()
    return run(lambda: measure(args))


def measure(args: argparse.Namespace) -> int:
    """Measure, write, and print what to do next. Raises DsmoeVlError."""
    from dsmoe_vl.parallel.device import device_name

    device_name()  # sets what DeepSpeed reads when it is imported
    from dsmoe_vl.doctor.alignment import align

    found = align(args.recipe, args.overrides, args.output, args.pairs)
    shrinkages = " and ".join(f"{value:g}" for value in found.shrinkages)
    print(f"aligned by {found.pairs:,} pairs, with shrinkages {shrinkages} of media and text states")
    if found.held_back:
        print(
            f"the {found.held_back:,} of them that chose these: mean reciprocal rank {found.reciprocal_rank:.3f} while "
            "they were held back"
        )
    print(f'wrote {args.output}; set model.init_from = "{args.output}" in the recipe')
    return 0


if __name__ == "__main__":
    leave(main())
