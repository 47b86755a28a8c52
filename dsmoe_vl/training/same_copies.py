"""The start of a run compares the data of all ranks: copies that differ would train a mixture of both, silently."""

from __future__ import annotations

import socket

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.copies import differences, read_copy
from dsmoe_vl.errors import DataError
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks


def require_same_copies(recipe: Recipe, ranks: Ranks, host: HostGroup) -> None:
    """Raise a DataError on every rank if one of them cannot read the tokenizer or a manifest, or has another one than
    most; it names that rank and its host. Collective."""
    own = read_copy(recipe, f"rank {ranks.rank} on {socket.gethostname()}")
    copies = host.gather(own)
    problems = ["".join(copy.problems[:1]) for copy in copies]
    if all(problems):
        raise DataError(problems[ranks.rank])
    for copy, problem in zip(copies, problems, strict=True):
        if problem:
            raise DataError(f"{copy.who} cannot read what the others can: {problem}")
    for _, text in differences(copies):
        raise DataError(text)
