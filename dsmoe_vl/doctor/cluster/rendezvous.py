"""How the doctor's ranks find each other: a store at the first host, as training has one, but with limits of seconds.

Nothing else is needed to exchange facts, so a cluster whose hosts cannot do a collective is still judged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks

CONNECT_SECONDS = 60.0  # for a rank to reach the first host
JOIN_SECONDS = 60.0  # for all ranks to be there: each imports torch first
FACTS_SECONDS = 60.0  # for all hosts to have gathered theirs
ANSWER_SECONDS = JOIN_SECONDS + FACTS_SECONDS + 30  # for rank 0 to tell the others what comes next
_LEAVE_SECONDS = 5.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Member:
    """A rank that has joined."""

    rank: int
    host: str
    local_rank: int


@dataclass(frozen=True)
class Clock:
    """Of another host: seconds since 1970 by it, by this host's own at the same moment, and the error of the latter."""

    clock: float
    heard: float
    clock_error: float

    @classmethod
    def between(cls, asked: float, clock: float, answered: float) -> Clock:
        """The other host has looked at its clock between two moments of this one."""
        return cls(clock, (asked + answered) / 2, (answered - asked) / 2)


class Rendezvous:
    """One rank's connection to the others."""

    def __init__(self, ranks: Ranks, host: str) -> None:
        """Connects, and says that this rank is there. Raises ConfigError if nothing says which the first host is, or
        if its port is in use, NetworkError if it does not answer."""
        self.ranks = ranks
        find_first_host(ranks)
        store = connect(ranks, timedelta(seconds=CONNECT_SECONDS))
        self.store = dist.PrefixStore("doctor", store)
        self.store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        self.member = Member(ranks.rank, host, ranks.local_rank)
        self.store.set(f"member/{ranks.rank}", json.dumps(asdict(self.member)))

    def members(self) -> list[Member]:
        """On rank 0: those that are there, after all are or have had the time to be."""
        keys = {rank: f"member/{rank}" for rank in range(self.ranks.world_size)}
        self._wait(lambda: all(self.store.check([key]) for key in keys.values()), JOIN_SECONDS)
        return [Member(**json.loads(self.store.get(key))) for key in keys.values() if self.store.check([key])]

    def put(self, key: str, text: str) -> None:
        """For `collect`."""
        self.store.set(f"{key}/{self.ranks.rank}", text)

    def collect(self, key: str, ranks: list[int], seconds: float) -> dict[int, str]:
        """What each of `ranks` has put there, of those that have within the time."""
        keys = {rank: f"{key}/{rank}" for rank in ranks}
        self._wait(lambda: all(self.store.check([one]) for one in keys.values()), seconds)
        return {rank: self.store.get(one).decode() for rank, one in keys.items() if self.store.check([one])}

    def tell(self, key: str, text: str) -> None:
        """On rank 0: an answer that the others `hear`."""
        self.store.set(key, text)

    def hear(self, key: str) -> str:
        """The answer of rank 0. Raises ConfigError if there is none in time."""
        try:
            return self.store.get(key).decode()
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"rank {self.ranks.rank} on {self.member.host} has heard nothing of rank 0 for {ANSWER_SECONDS:.0f} s"
            ) from error

    def clocks(self, ranks: list[int]) -> dict[int, Clock]:
        """The clock of each of `ranks`, which all call this; the result is rank 0's."""
        asked = time.time()
        if self.ranks.rank == 0:
            self.tell("time?", "")
        self.hear("time?")
        self.put("time", repr(time.time()))
        if self.ranks.rank:
            return {}
        told = self.collect("time", ranks, _LEAVE_SECONDS)
        return {rank: Clock.between(asked, float(text), time.time()) for rank, text in told.items()}

    def leave(self, ranks: list[int]) -> None:
        """Rank 0, whose process connects the others, waits a moment for them."""
        if self.ranks.rank:
            self.put("left", "")
        else:
            self.collect("left", [rank for rank in ranks if rank], _LEAVE_SECONDS)

    def _wait(self, is_done: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not is_done() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
