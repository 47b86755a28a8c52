"""Parameters of the shipped recipes, as the planner counts them.

python benchmarks/sizes.py [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from record import ROOT, Result

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.planner.counts import count_parameters


def main() -> int:
    """Print all and active parameters of every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    args = parser.parse_args()
    figures = {}
    for file in (ROOT / "launch/recipes").glob("*.toml"):
        if "init_from" in tomllib.loads(file.read_text(encoding="utf-8")).get("model", {}):
            print(f"{file.stem:20} has the size of the weights that it starts from")
            continue
        counts = count_parameters(load_recipe(file))
        figures[file.stem] = {"parameters": counts.total, "active_parameters": counts.active}
    figures = dict(sorted(figures.items(), key=lambda item: item[1]["parameters"]))
    for name, size in figures.items():
        print(f"{name:20} {size['parameters']:>16,} parameters, {size['active_parameters']:>14,} active")
    if args.json:
        Result.now("sizes", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
