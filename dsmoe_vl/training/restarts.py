"""Starts the ranks of a run again after one of them ended: `launch/train.py --max-restarts N`, under every launcher.

Each process that the launcher starts becomes the supervisor of a rank, which is a process of its own. The supervisors
talk through a store that the first one hosts, so that one must stay; it decides. A round is one start of all ranks:
when one of them ends with an error, the others are ended, and the supervisors that still answer begin the next round,
with as many ranks as the plan allows. A run continues from its newest sound checkpoint by itself.

Not started again: a run that a user's error ended (status 2), one that was asked to stop, and one that was started
again N times without a new checkpoint.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsmoe_vl.checkpoint.store import CHECKPOINTS_NAME, newest_complete
from dsmoe_vl.console import tell
from dsmoe_vl.data.background import BackgroundThread
from dsmoe_vl.errors import ConfigError, DsmoeVlError
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks, whole_number
from dsmoe_vl.training.signals import StopRequest

_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"  # in the environment of torchrun's ranks
SUPERVISOR = "DSMOE_VL_SUPERVISOR"  # in the environment of a rank: the process id of its supervisor
_POLL_SECONDS = 0.2
_JOIN_SECONDS = 1200.0  # for all to be there in the first round
_REJOIN_SECONDS = 30.0  # for the others in a later one; who is later is left out
_ANSWER_SECONDS = 60.0  # in which the first supervisor answers, else it has gone
_LAST_SECONDS = 5.0  # of a rank's own end, once another has ended
_STOP = "stop"  # a key: a supervisor was asked to stop
_PR_SET_PDEATHSIG = 1
_USER_ERROR = 2  # the status


@dataclass(frozen=True)
class _Round:
    """What the first supervisor decides: the supervisors whose ranks run, by number, and the port of the ranks' store.
    Or the end, with a status."""

    number: int
    members: tuple[int, ...] = ()
    port: int = 0
    status: int | None = None


class _LimitedStore:
    """A store whose calls raise TimeoutError after a minute: torch's own wait for a host whose link is cut, for as long
    as the system does."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._calls: BackgroundThread[Any] = BackgroundThread()

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return self._calls.submit(call).result(_ANSWER_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"no answer for {_ANSWER_SECONDS:.0f} s") from None

    def set(self, key: str, value: str) -> None:
        """Set a key."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """The value of a key that is set."""
        value: bytes = self._ask(lambda: self._store.get(key))
        return value

    def has(self, key: str) -> bool:
        """Whether a key is set."""
        return bool(self._ask(lambda: self._store.check([key])))

    def set_first(self, key: str, value: str) -> None:
        """Set a key unless it is set."""
        self._ask(lambda: self._store.compare_set(key, "", value))


def end_with_supervisor() -> bool:
    """Whether this process is a rank with a supervisor. If so, the system will end it when that one ends."""
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is None:
        return False
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(supervisor):  # it has ended before that call
        os._exit(1)
    return True


class Supervisor:
    """Of one rank, in the process that the launcher started."""

    def __init__(
        self,
        ranks: Ranks,
        stop: StopRequest,
        command: Callable[[int], Sequence[str]],
        run_dir: Path,
        restarts: int,
        check: Callable[[int], object],
    ) -> None:
        """
        command: of a rank, by the number of the round.
        restarts: at most, without a new checkpoint in between.
        check: raises DsmoeVlError for a number of ranks that cannot be trained.

        Raises ConfigError, NetworkError where the store cannot be reached.
        """
        if whole_number({_RESTARTS: "0", **os.environ}, _RESTARTS, "torchrun") > 0:
            raise ConfigError(
                "torchrun restarts ranks itself, with its own --max-restarts: give it to torchrun or to "
                "launch/train.py, not to both"
            )
        self.ranks, self.stop, self.command, self.run_dir, self.check = ranks, stop, command, run_dir, check
        self.allowed, self.used = restarts, 0
        self.saved = self._newest_step()
        find_first_host(ranks)
        self.host = os.environ["MASTER_ADDR"]
        self.store = _LimitedStore(connect(ranks, timedelta(seconds=_JOIN_SECONDS)))
        self.there = tuple(range(ranks.world_size))  # the supervisors that answered last

    def run(self) -> int:
        """Rounds until the run has ended: its status."""
        with self.stop:
            why = ""
            for number in itertools.count():
                try:
                    decided = self._begin(number, why)
                    if decided.status is not None:
                        return self._leave(decided)
                    why = self._supervise(decided)
                    if not why:
                        return self._leave(decided)
                except (RuntimeError, OSError) as error:  # torch's errors of a store
                    self._tell(f"the first supervisor does not answer, so nothing is started again: {error}")
                    return 1
        raise AssertionError("count has no end")

    def _begin(self, number: int, why: str) -> _Round:
        """Join a round, and wait for what it will be."""
        self.store.set(f"join/{number}/{self.ranks.rank}", "")
        key = f"decision/{number}"
        if self.ranks.rank == 0:
            self.store.set(key, json.dumps(asdict(self._decide(number, why))))
        while not self.store.has(key):
            time.sleep(_POLL_SECONDS)
        found = json.loads(self.store.get(key))
        return _Round(**{**found, "members": tuple(found["members"])})

    def _decide(self, number: int, why: str) -> _Round:
        """On the first supervisor."""
        until = time.monotonic() + (_REJOIN_SECONDS if number else _JOIN_SECONDS)
        while not set(self.there) <= set(joined := self._joined(number)) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        self.there, expected = joined, self.there
        if number == 0:
            if joined != expected:
                absent = sorted(set(expected) - set(joined))
                self._tell(f"ranks {absent} were not there within {_JOIN_SECONDS:.0f} s")
                return _Round(number, status=1)
            return _Round(number, joined, _free_port())
        if self.stop.received or self.store.has(_STOP):
            self._tell(f"not started again: {why}, but the run was asked to stop")
            return _Round(number, status=1)
        if self._status_of(number - 1) == _USER_ERROR:
            self._tell(f"not started again: {why}, which another start would not change")
            return _Round(number, status=_USER_ERROR)
        step = self._newest_step()
        if step > self.saved:
            self.saved, self.used = step, 0
        if self.used == self.allowed:
            self._tell(
                f"not started again: {why}, after {self.used} restarts without a new checkpoint (--max-restarts "
                f"{self.allowed}); the newest one is of step {step}"
            )
            return _Round(number, status=1)
        self.used += 1
        members, problem = self._largest(joined)
        if not members:
            self._tell(f"not started again: {why}, and {len(joined)} ranks are too few: {problem}")
            return _Round(number, status=_USER_ERROR)
        fewer = f" of {self.ranks.world_size}" if len(members) < self.ranks.world_size else ""
        self._tell(
            f"restart {self.used} of {self.allowed} since step {step}: {why}; {len(members)}{fewer} ranks start again"
        )
        return _Round(number, members, _free_port())

    def _largest(self, joined: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """As many of the supervisors as the plan allows, from the first; else none, with the reason."""
        problem = ""
        for size in range(len(joined), 0, -1):
            try:
                self.check(size)
                return joined[:size], ""
            except DsmoeVlError as error:
                problem = problem or str(error)
        return (), problem

    def _supervise(self, round_: _Round) -> str:
        """Run this supervisor's rank until the round is over: why; "" if the run has ended well."""
        if self.ranks.rank not in round_.members:
            while not self.store.has(f"over/{round_.number}"):
                if self.store.has(f"done/{round_.number}"):
                    return ""
                time.sleep(_POLL_SECONDS)
            return self._why(round_.number)
        rank = round_.members.index(self.ranks.rank)
        process = subprocess.Popen(self.command(round_.number), env=self._environment(round_, rank))
        try:
            return self._watch(process, round_, rank)
        finally:
            process.kill()
            process.wait()

    def _watch(self, process: subprocess.Popen[bytes], round_: _Round, rank: int) -> str:
        is_told = False
        while (status := process.poll()) is None:
            if self.stop.received and not is_told:
                self.store.set(_STOP, "")
                process.terminate()
                is_told = True
            if self.store.has(f"over/{round_.number}"):
                until = time.monotonic() + _LAST_SECONDS
                while process.poll() is None and time.monotonic() < until:
                    time.sleep(_POLL_SECONDS)
                return self._why(round_.number)
            time.sleep(_POLL_SECONDS)
        if status == 0:
            if rank == 0:
                self.store.set(f"done/{round_.number}", "")
            return ""
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        ended = json.dumps({"why": f"rank {rank} on {socket.gethostname()} {how}", "status": status})
        self.store.set_first(f"over/{round_.number}", ended)  # only the first one is kept
        return self._why(round_.number)

    def _leave(self, round_: _Round) -> int:
        """The status. The first supervisor waits for the others, because it connects them."""
        self.store.set(f"left/{round_.number}/{self.ranks.rank}", "")
        until = time.monotonic() + _LAST_SECONDS
        while self.ranks.rank == 0 and time.monotonic() < until:
            if all(self.store.has(f"left/{round_.number}/{rank}") for rank in self.there):
                break
            time.sleep(_POLL_SECONDS)
        return round_.status or 0

    def _environment(self, round_: _Round, rank: int) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")},
            "RANK": str(rank), "WORLD_SIZE": str(len(round_.members)),
            "LOCAL_RANK": str(self.ranks.local_rank), "LOCAL_SIZE": str(self.ranks.local_size),
            "MASTER_ADDR": self.host, "MASTER_PORT": str(round_.port),
            SUPERVISOR: str(os.getpid()),
        }  # fmt: skip

    def _joined(self, number: int) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.ranks.world_size) if self.store.has(f"join/{number}/{rank}"))

    def _ended(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.get(f"over/{number}"))
        return found

    def _why(self, number: int) -> str:
        return str(self._ended(number)["why"])

    def _status_of(self, number: int) -> int:
        return int(self._ended(number)["status"])

    def _newest_step(self) -> int:
        found = newest_complete(self.run_dir / CHECKPOINTS_NAME)
        return found[1].step if found else 0

    def _tell(self, text: str) -> None:
        tell(f"supervisor of rank {self.ranks.rank}: {text}")


def _free_port() -> int:
    """A port of this host that nobody uses now. A killed round may leave its own one busy for a minute."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
