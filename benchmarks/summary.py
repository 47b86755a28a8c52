"""All figures of README.md and docs/ as tables, from the result files in benchmarks/results/.

python -m benchmarks.summary             prints every table
python -m benchmarks.summary --write     puts them into the pages, between `<!-- figures: NAME -->` and `<!-- end -->`
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import planning_tables as planned
from benchmarks import results_tables as learned
from benchmarks import speed_tables as timed
from benchmarks.record import RESULTS, ROOT, Result
from benchmarks.tables import Results

BLOCKS = {
    function.__name__: function
    for function in (
        learned.quickstart_output, learned.results, learned.sizes, learned.recipes, learned.catalogue, learned.scenes,
        learned.task_weights, learned.together_and_alone, learned.learning, learned.ablations, learned.rates,
        learned.parting, learned.speech, learned.pretrained, learned.pretrained_pictures,
        timed.speed, timed.train_step, timed.train_peer, timed.moe_cost, timed.moe_layer, timed.traffic, timed.growth,
        timed.packing, timed.monitoring,
        timed.data, timed.checkpoint, timed.import_model, timed.generate,
        planned.published, planned.planning, planned.scaling, planned.budgets, planned.internet,
    )
}  # fmt: skip
PAGES = (ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md")))
_BEGIN, _END = "<!-- figures: {} -->", "<!-- end -->"


def read_results(folder: Path = RESULTS) -> Results:
    """The result files of a folder, by benchmark. Raises SystemExit for a file of another form."""
    found: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("*.json")):
        result = Result.read(file)
        found.setdefault(result.benchmark, []).append(result)
    return found


def filled(page: str, results: Results) -> str:
    """A page with its marked blocks as the results make them. Raises SystemExit for a block without name or end."""
    parts = re.split(r"<!-- figures: (.*?) -->\n", page)
    text = parts[0]
    for name, rest in zip(parts[1::2], parts[2::2], strict=True):
        if name not in BLOCKS:
            raise SystemExit(f"no figures are called {name}; there are {', '.join(BLOCKS)}")
        _, end, after = rest.partition(_END)
        if not end:
            raise SystemExit(f"the figures {name} have no {_END}")
        text += f"{_BEGIN.format(name)}\n\n{BLOCKS[name](results)}\n\n{_END}{after}"
    return text


def main() -> int:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into README.md and docs/")
    args = parser.parse_args()
    results = read_results()
    if not args.write:
        print("\n\n".join(f"## {name}\n\n{block(results)}" for name, block in BLOCKS.items()))
        return 0
    for page in PAGES:
        before = page.read_text()
        if (after := filled(before, results)) != before:
            page.write_text(after)
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
