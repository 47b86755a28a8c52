"""How fast this host reads the recipe's shards, and computes: the two sides of "will training wait for data?"."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from dsmoe_vl.config.recipe import Recipe, SourceConfig
from dsmoe_vl.data.shards.download import download, file_url
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.doctor.cluster.host_facts import HostFacts, Limited, SourceRate
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.registry import Encoder, build_tasks

_READ_SECONDS = 8.0  # for all sources together
_SOURCE_SECONDS = 1.5  # at most, for one
_BLOCK = 2**22  # bytes
_SAMPLES = 8  # of each source, to see what a sample is
_MATRIX_SECONDS = 0.3
_COPY_BYTES = 2**26


def with_supply(facts: HostFacts, recipe: Recipe, local_ranks: int, bf16: bool) -> HostFacts:
    """The facts with the rates of this host. `local_ranks`: that share its cores; `bf16`: do they compute in it?"""
    limited = Limited()
    cores = torch.get_num_threads()
    if facts.device == "cpu":
        torch.set_num_threads(max(1, facts.cores // local_ranks))
    try:
        return replace(
            facts,
            matrix_rate=limited("matrix_rate", lambda: _matrix_rate(facts.device, bf16)),
            copy_rate=limited("copy_rate", _copy_rate),
            sources=limited("sources", lambda: _source_rates(recipe), 2 * _READ_SECONDS + 5),
            unknown={**facts.unknown, **limited.unknown},
        )
    finally:
        torch.set_num_threads(cores)


def _source_rates(recipe: Recipe) -> tuple[SourceRate, ...]:
    sources = recipe.data.sources
    seconds = min(_SOURCE_SECONDS, _READ_SECONDS / len(sources))
    encode = Encoder(build_tasks(recipe, Tokenizer.of(recipe), training=False))
    found = []
    for source in sources:
        index = ShardIndex.load(source.path, recipe.data)
        sample_bytes = sum(shard.bytes for shard in index.shards) / index.samples
        tokens = 0.0 if index.remote else _mean_tokens(recipe, source, encode, seconds)
        found.append(SourceRate(source.name, source.weight, _read_rate(source, index, seconds), sample_bytes, tokens))
    return tuple(found)


def _mean_tokens(recipe: Recipe, source: SourceConfig, encode: Encoder, seconds: float) -> float:
    """Tokens of a sample in all its tasks. Samples that training would pass over are passed over and not reported, as
    any samples will do."""
    until, lengths = time.monotonic() + seconds, []
    samples = iterate_samples(source, data=recipe.data, failed=lambda shard, number, error: None)
    for sample in islice(samples, 4 * _SAMPLES):
        try:
            lengths.append(sum(segment.length for segment in encode(sample)))
        except DataError:
            continue
        if len(lengths) == _SAMPLES or time.monotonic() > until:
            break
    return sum(lengths) / len(lengths) if lengths else 0.0


def _read_rate(source: SourceConfig, index: ShardIndex, seconds: float) -> float:
    """Bytes per second of one reader, from the first shard on."""
    started, received = time.monotonic(), 0
    for shard in index.shards:
        path = index.folder / shard.name
        with closing(_download(source, shard.name, seconds) if index.remote else _blocks(path)) as blocks:
            for block in blocks:
                received += len(block)
                if time.monotonic() - started > seconds:
                    return received / (time.monotonic() - started)
    return received / (time.monotonic() - started)


def _download(source: SourceConfig, name: str, seconds: float) -> Generator[bytes, None, None]:
    return download(file_url(source.path, name), 2 * seconds)


def _blocks(path: Path) -> Generator[bytes, None, None]:
    """A file from the disk, not from the system's memory of files that were read before, where the system allows it."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(_BLOCK):
            yield block


def _matrix_rate(device: str, bf16: bool) -> float:
    """FLOP/s of square matrix products in what training computes in."""
    size = 8192 if device == "cuda" else 512
    kind = torch.bfloat16 if bf16 else torch.float32
    one, other = (torch.ones(size, size, device=device, dtype=kind) for _ in range(2))
    result = one @ other
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _MATRIX_SECONDS:
        torch.matmul(one, other, out=result)
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
    return done * 2 * size**3 / passed


def _copy_rate() -> float:
    """Bytes per second that a copy in the host's memory moves."""
    one = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    other = one.clone()
    started = time.perf_counter()
    for _ in range(4):
        other.copy_(one)
    return 4 * _COPY_BYTES / (time.perf_counter() - started)
