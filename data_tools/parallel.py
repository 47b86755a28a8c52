"""A parallel map over threads, for work that releases the interpreter lock (reading, decoding, encoding)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 16  # items per worker whose results are in memory together


def default_workers() -> int:
    """One thread per core, and at most 8, because each has decoded videos in memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` in `workers` threads; results in the order of `items`.

    Items are processed in batches: `ThreadPoolExecutor.map` alone would keep the results of all items in memory.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(remaining, BATCH * workers)):
            yield from pool.map(function, batch)
