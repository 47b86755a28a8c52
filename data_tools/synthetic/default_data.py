"""The data of the quickstart, made when a run asks for them and they are missing."""

from __future__ import annotations

from pathlib import Path

from data_tools.synthetic.generate import generate
from data_tools.tokenizer.train import train
from dsmoe_vl.planner.plan import RunPlan


def make_default_data(plan: RunPlan) -> None:
    """The quickstart's synthetic shards and tokenizer, whichever of them is missing. Raises DataError."""
    tokenizer = Path(plan.recipe.tokenizer.path)
    sources = [Path(source.path) for source in plan.recipe.data.sources]
    if not any(source.exists() for source in sources):
        print(f"{tokenizer.parent} has no shards: making the synthetic ones of the quickstart (once)", flush=True)
        generate(tokenizer.parent)
    if not tokenizer.exists():
        train(sources, tokenizer, vocab_size=plan.recipe.tokenizer.vocab_size)
