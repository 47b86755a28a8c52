"""A parallel map for work that releases the interpreter lock (reading, decoding, encoding)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 16  # items a worker; their results are what memory has to hold


def default_workers() -> int:
    """Threads that keep this machine busy without holding many decoded videos in memory."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` over `workers` threads: results in the order of `items`.

    It goes in batches: `ThreadPoolExecutor.map` alone would start on all items and hold every result until it is asked
    for, which for a data set of media is more than memory.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(remaining, BATCH * workers)):
            yield from pool.map(function, batch)
