"""Does sparsity help, does the gate's knowledge of the task help, does learning together cost anything?

    python benchmarks/compare.py [--parts catalogue scenes task_weights alone] [--seeds 1 2 3] [--jobs 2] [--plot]
                                                                               (some two hours on two cores)

Trains, one process a run, and writes a result file of each part to benchmarks/results/; `--plot` draws the first two
for docs/results.md, and needs matplotlib (the extra "compare"). Runs are kept in runs/compare; those that are there are
not trained again. Needs the quickstart's shards.

- Variants of two recipes, the catalogue (catalogue.py) and `three_tasks.toml` on smaller packs: as it is, with a plain
  gate, and dense at equal active FLOPs; a seed decides first values and the order of the data. All variants of a seed
  see the same packs.
- Weights of tasks: the same small packs, with the recipe's weights and with learned factors.
- Alone: `three_tasks.toml` as it is, and with one task and packs so much smaller that a step holds as many of its
  samples.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import catalogue
from record import RESULTS, ROOT, Result
from run import DEEPSPEED, Run

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks

_THREE_TASKS = ROOT / "launch/recipes/three_tasks.toml"
_PLOT = ROOT / "docs/images/sparse_against_dense.png"

SPARSE, PLAIN, DENSE = "sparse, gate knows task and modality", "sparse, plain gate", "dense, equal active FLOPs"


@dataclass(frozen=True)
class World:
    """A recipe whose variants are compared: overrides of the recipe by name, beside those that all of them have."""

    name: str
    recipe: Path
    steps: int
    common: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]


_PLAIN_GATE = "moe.routing=plain"
# Rates for so few steps: rates.py. Each expert sees a quarter of the tokens.
_RATES = 'train={"*"={lr_scale=1}, embedding={lr_scale=10}, experts={lr_scale=2}}'
# The experts of a token are together as wide as the dense feed-forward.
CATALOGUE = World(
    "catalogue",
    ROOT / "benchmarks/catalogue.toml",
    1250,
    (),
    {SPARSE: (), PLAIN: (_PLAIN_GATE,), DENSE: ("moe.first_dense_layers=3",)},
)
SCENES = World(
    "scenes",
    _THREE_TASKS,
    256,
    ("data.pack_length=1024", "data.pack_patches=3840", "run.evaluate_every=32", "run.evaluate_packs=16"),
    {
        SPARSE: (_RATES,),
        PLAIN: (_RATES, _PLAIN_GATE),
        DENSE: (
            "moe.first_dense_layers=4", "model.ffn_width=512",
            'train={"*"={lr_scale=1}, embedding={lr_scale=10}}',
        ),
    },
)  # fmt: skip
TASK_WEIGHTS = replace(
    SCENES,
    name="task_weights",
    steps=128,
    variants={
        method: (_RATES, f"objective.task_weights.method={method}") for method in ("fixed", "uncertainty", "famo")
    },
)
_WORLDS = {world.name: world for world in (CATALOGUE, SCENES, TASK_WEIGHTS)}
_TITLES = {CATALOGUE.name: "A catalogue to remember", SCENES.name: "Three tasks on scenes"}  # those that are drawn
_PARTS = (*_WORLDS, "alone")
# Of each task: its scores, as (folder of shards, name in eval.json).
SCORES = {
    "caption": [("images_eval", "attribute_accuracy"), ("videos_eval", "attribute_accuracy")],
    "retrieval": [
        ("images_eval", "media_to_text_r1"), ("images_eval", "text_to_media_r1"),
        ("videos_eval", "media_to_text_r1"), ("videos_eval", "text_to_media_r1"),
    ],
    "summary": [
        ("videos_eval", "key_frame_f"), ("videos_eval", "kendall_tau"), ("videos_eval", "attribute_accuracy"),
    ],
}  # fmt: skip


@dataclass
class Variant:
    """What the seeds of one variant came to."""

    name: str
    parameters: int
    active: int
    flops_per_token: float
    steps: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # [seed][evaluation]
    last: list[dict[str, float]] = field(
        default_factory=list
    )  # [seed], every held-out term at the end, and learned weights of tasks


def compare_variants(world: World, args: argparse.Namespace) -> list[Variant]:
    """Train every variant with every seed."""
    common = (*world.common, f"run.steps={world.steps}")
    found: list[Variant] = []
    runs: list[tuple[Variant, Run]] = []
    for name, overrides in world.variants.items():
        recipe = load_recipe(world.recipe, (*common, *overrides))
        plan = resolve(recipe, load_deepspeed(DEEPSPEED), 1, device="cpu", bf16_unit=False)
        variant = Variant(name, plan.parameters.total, plan.parameters.active, plan.flops_per_token)
        found.append(variant)
        for seed in args.seeds:
            folder = args.runs / world.recipe.stem / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            runs.append((variant, Run(folder, world.recipe, (*common, *overrides, f"run.seed={seed}"))))
    runs.sort(key=lambda pair: pair[1].folder.name.rpartition("_")[2])  # a whole seed, then the next
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda pair: pair[1].train(), runs))
    for variant, run in runs:
        metrics = run.metrics()
        lines = [line for line in metrics if "eval_loss" in line]
        variant.steps = [line["step"] for line in lines]
        variant.losses.append([line["eval_loss"] for line in lines])
        of_training = [line for line in metrics if "loss" in line][-1]
        learned = {name: value for name, value in of_training.items() if name.startswith("weight_")}
        losses = {name: value for name, value in lines[-1].items() if name.startswith("eval_loss")}
        variant.last.append(losses | learned)
    return found


def compare_alone(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train all tasks together, then each of them alone: rows of scores."""
    recipe = load_recipe(_THREE_TASKS)
    together = Run(args.together, _THREE_TASKS, ranks=2)
    together.train()
    rows: list[dict[str, Any]] = []
    for task, scores in SCORES.items():
        alone = Run(args.runs / f"alone_{task}", _THREE_TASKS, _alone(recipe, task), ranks=2)
        alone.train()
        counts = [_samples(run, recipe, task) for run in (together, alone)]
        for folder, name in scores:
            values = [run.evaluate()[folder][task][name] for run in (together, alone)]
            rows.append({"task": task, "score": f"{folder.removesuffix('_eval')}: {name}", "values": values,
                         "samples": counts})  # fmt: skip
    return rows


def _alone(recipe: Recipe, task: str) -> tuple[str, ...]:
    """Overrides that leave one task, and as many of its samples a step as before."""
    sources = [source for source in recipe.data.sources if source.tasks == (task,)]
    lengths = {source.name: source.weight * _mean_tokens(recipe, source.name) for source in recipe.data.sources}
    share = sum(lengths[source.name] for source in sources) / sum(lengths.values())
    length = round(recipe.data.pack_length * share / 8) * 8
    tables = ", ".join(f'{{name="{s.name}", path="{s.path}", weight={s.weight}, tasks=["{task}"]}}' for s in sources)
    folders = {folder for folder, _ in SCORES[task]}
    held_out = ", ".join(
        f'{{name="{source.name}", path="{source.path}"}}'
        for source in recipe.data.evaluation
        if Path(source.path).name in folders
    )
    off = [f"tasks.{other}.weight=0" for other in SCORES if other != task]
    patches = length * recipe.model.vision.merge**2  # enough for a pack of pictures alone
    packs = (f"data.pack_length={length}", f"data.pack_patches={patches}")
    return (*off, f"data.sources=[{tables}]", f"data.evaluation=[{held_out}]", *packs)


def _mean_tokens(recipe: Recipe, source_name: str) -> float:
    """Tokens of an average sample of a source."""
    encode = Encoder(build_tasks(recipe, Tokenizer.of(recipe)))
    source = next(source for source in recipe.data.sources if source.name == source_name)
    samples = islice(iterate_samples(source), 100)
    return statistics.fmean(sum(segment.length for segment in encode(sample)) for sample in samples)


def _samples(run: Run, recipe: Recipe, task: str) -> int:
    """Samples of a task that a run has read."""
    last = [line for line in run.metrics() if "loss" in line][-1]
    return sum(last[f"{source.name}/samples"] for source in recipe.data.sources if source.tasks == (task,))


def draw() -> None:
    """Mean and range of the seeds by step, from the result files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_TITLES), figsize=(11, 4), dpi=120)
    for axes, (name, title) in zip(panels, _TITLES.items(), strict=True):
        for found in Result.read(RESULTS / f"{name}.json").figures["variants"]:
            variant = Variant(**found)
            by_step = list(zip(*variant.losses, strict=True))[1:]  # the first is before training
            means = [statistics.fmean(step) for step in by_step]
            (line,) = axes.plot(variant.steps[1:], means, marker="o", ms=3, label=variant.name)
            least, most = [min(step) for step in by_step], [max(step) for step in by_step]
            axes.fill_between(variant.steps[1:], least, most, color=line.get_color(), alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("held-out loss")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.tight_layout()
    figure.savefig(_PLOT)


def main() -> int:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="variants that train at a time, a core each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/compare")
    parser.add_argument("--together", type=Path, default=ROOT / "runs/three_tasks", help="the run of all tasks")
    parser.add_argument("--plot", action="store_true", help=f"draw {_PLOT.relative_to(ROOT)}")
    args = parser.parse_args()
    os.chdir(ROOT)  # where the recipes' paths begin
    for part in args.parts:
        if part == CATALOGUE.name:
            catalogue.make(ROOT / "data/catalogue")
        if part in _WORLDS:
            variants = [asdict(variant) for variant in compare_variants(_WORLDS[part], args)]
            figures: dict[str, Any] = {"seeds": args.seeds, "variants": variants}
        else:
            figures = {"rows": compare_alone(args)}
        Result.now(part, figures, f"python benchmarks/compare.py --parts {part}").write(RESULTS / f"{part}.json")
    if args.plot:
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
