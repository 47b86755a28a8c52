"""Whether the hosts of a run see the same tokenizer and shards: each may have a copy of its own."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.config.source_map import map_sha256
from dsmoe_vl.data.shards.download import without_query
from dsmoe_vl.data.shards.index import manifest_sha256
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_start import read_word_start
from dsmoe_vl.errors import as_user_error

_DIGITS = 12  # of a hash in a message


@dataclass(frozen=True)
class Copy:
    """What one process sees. `who`: such as "rank 1 on node-2". `hashes`: hex SHA-256 of what it can read, by
    what that is. `problems`: why it cannot read the rest."""

    who: str
    hashes: dict[str, str]
    problems: tuple[str, ...]


def read_copy(recipe: Recipe, who: str) -> Copy:
    """Hash the recipe's tokenizer and vectors of words, and the manifests and transformations of its sources. Shards
    are not read."""
    data = recipe.data
    parts: list[tuple[str, str, Callable[[], str]]] = [
        ("", f"tokenizer {recipe.tokenizer.path}", partial(_tokenizer_sha256, recipe))
    ]
    if recipe.model.embedding_from:
        parts.append(("", f"model.embedding_from {recipe.model.embedding_from}", partial(_vectors_sha256, recipe)))
    for part, sources in (("data.sources", data.sources), ("data.evaluation", data.evaluation)):
        for source in sources:
            prefix = f"{part}, {source.name}: "
            parts.append((prefix, prefix + without_query(source.path), partial(manifest_sha256, source.path, data)))
            if source.map:
                parts.append((prefix, f"{prefix}map {source.map}", partial(map_sha256, source.map, source.name)))
    hashes, problems = dict[str, str](), []
    for prefix, what, sha256 in parts:
        try:
            hashes[what] = sha256()
        except Exception as error:
            known = as_user_error(error)
            if known is None:
                raise
            problems.append(f"{prefix}{known}")
    return Copy(who, hashes, tuple(problems))


def differences(copies: Sequence[Copy]) -> list[tuple[Copy, str]]:
    """The copies that differ from what most have, each with the message about it."""
    found = []
    for what in dict.fromkeys(what for copy in copies for what in copy.hashes):
        having = [copy for copy in copies if what in copy.hashes]
        common = Counter(copy.hashes[what] for copy in having).most_common(1)[0][0]
        usual = next(copy for copy in having if copy.hashes[what] == common)
        for copy in having:
            if copy.hashes[what] != common:
                text = (
                    f"{what} is another on {copy.who} (sha256 {copy.hashes[what][:_DIGITS]}) than on {usual.who} "
                    f"({common[:_DIGITS]}): copy it from there, or name one that all hosts share"
                )
                found.append((copy, text))
    return found


def _vectors_sha256(recipe: Recipe) -> str:
    start = read_word_start(recipe, Tokenizer.of(recipe))
    assert start is not None, "the recipe names vectors"
    return start.sha256


def _tokenizer_sha256(recipe: Recipe) -> str:
    Tokenizer.of(recipe)  # whether it can be used at all
    return hashlib.sha256(Path(recipe.tokenizer.path).read_bytes()).hexdigest()
