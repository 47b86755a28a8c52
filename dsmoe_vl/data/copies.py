"""Whether the hosts of a run see the same tokenizer and shards: each may have a copy of its own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.shards.download import without_query
from dsmoe_vl.data.shards.index import manifest_sha256
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import as_user_error

_DIGITS = 12  # of a hash in a message


@dataclass(frozen=True)
class Copy:
    """What one process sees. `who`: in messages, such as "rank 1 on node-2".

    By the setting that names it, `hashes` has the hex SHA-256 of what could be read, `problems` why the rest could not.
    """

    who: str
    hashes: dict[str, str]
    problems: dict[str, str]


def read_copy(recipe: Recipe, who: str) -> Copy:
    """Hash the recipe's tokenizer, and the manifests of its sources. Shards themselves are not read."""
    copy = Copy(who, {}, {})
    path = recipe.tokenizer.path
    _add(copy, f"tokenizer.path = {path}", lambda: _tokenizer_sha256(recipe))
    for part, sources in (("data.sources", recipe.data.sources), ("data.evaluation", recipe.data.evaluation)):
        for source in sources:
            place = f"{part}, {source.name}: {without_query(source.path)}"
            _add(copy, place, partial(manifest_sha256, source.path, recipe.data))
    return copy


def differences(copies: Sequence[Copy]) -> list[tuple[Copy, str]]:
    """The copies that differ from what most have, each with the message about it: one for every place."""
    found = []
    for place in dict.fromkeys(place for copy in copies for place in copy.hashes):
        having = [copy for copy in copies if place in copy.hashes]
        common = Counter(copy.hashes[place] for copy in having).most_common(1)[0][0]
        usual = next(copy for copy in having if copy.hashes[place] == common)
        for copy in having:
            if copy.hashes[place] != common:
                text = (
                    f"{place} is another on {copy.who} (sha256 {copy.hashes[place][:_DIGITS]}) than on {usual.who} "
                    f"({common[:_DIGITS]}): copy it from there, or name one that all hosts share"
                )
                found.append((copy, text))
    return found


def _tokenizer_sha256(recipe: Recipe) -> str:
    Tokenizer.of(recipe)  # whether it can be used at all
    return hashlib.sha256(Path(recipe.tokenizer.path).read_bytes()).hexdigest()


def _add(copy: Copy, place: str, sha256: Callable[[], str]) -> None:
    try:
        copy.hashes[place] = sha256()
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            raise
        copy.problems[place] = str(known)
