"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.parallel.ranks import Ranks


class Threads:
    """The `gather` of a HostGroup among threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.values: list[Any] = [None] * count

    def of(self, rank: int) -> Any:
        """The group of one rank."""

        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return type("Group", (), {"gather": staticmethod(gather)})()

    def run(self, work: Callable[[Dealer], Any]) -> list[Any]:
        """`work(dealer)` on every rank."""
        dealers = [Dealer(Ranks(rank, self.count, rank), self.of(rank)) for rank in range(self.count)]
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, dealers))
