"""Ranks meet: all are there, agree on how many they are, and every two hosts reach each other.

This comes before the first process group. Torch waits for an absent rank without naming it, and two hosts between which
a firewall stands would only be a group that is not ready in time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from dsmoe_vl.errors import ConfigError, NetworkError
from dsmoe_vl.parallel.ranks import Ranks

INTERFACE = "GLOO_SOCKET_IFNAME"
_REACH_SECONDS = 30.0  # for one host to answer another
_THREADS = 32  # connections that a host opens at the same time
_FEW = 3  # ranks and pairs that a message lists
_HELLO = b"dsmoe_vl"
_GUEST, _HOSTS, _REACHED, _VERDICT = "meet/rank{}", "meet/hosts", "meet/reached{}", "meet/verdict"


@dataclass(frozen=True)
class Guest:
    """What a rank says of itself. `address`, `port`: where it answers other hosts."""

    rank: int
    world_size: int
    host: str
    address: str
    port: int

    @property
    def name(self) -> str:
        return f"{self.host} (rank {self.rank}, {self.address})"


def meet(ranks: Ranks, store: dist.Store, arrival_seconds: float) -> None:
    """Wait until every rank is there; then, if there are several hosts, each connects to every other.

    `store`: of these ranks alone, hosted by the first one or by the launcher. `arrival_seconds`: for the last rank,
    after the first one: hosts start and import at different speeds.

    Raises on every rank that is there: NetworkError that names the ranks that are not, or the pairs of hosts that do
    not reach each other; ConfigError if ranks were started with different numbers of ranks, or if a host has no
    address for others.
    """
    try:
        _meet(ranks, store, arrival_seconds)
    except dist.DistNetworkError as error:  # of the store
        raise NetworkError("the first host (rank 0) has stopped answering") from error


def _meet(ranks: Ranks, store: dist.Store, arrival_seconds: float) -> None:
    with _answering() as port:
        own = Guest(ranks.rank, ranks.world_size, socket.gethostname(), own_address(), port)
        store.set(_GUEST.format(own.rank), json.dumps(asdict(own)))
        if own.rank == 0:
            _tell(store, _HOSTS, lambda: _hosts(store, own, arrival_seconds))
        hosts = [Guest(**one) for one in _hear(store, _HOSTS, 2 * arrival_seconds)]
        if own in hosts:
            found = _unreachable(own, [other for other in hosts if other != own])
            store.set(_REACHED.format(own.rank), json.dumps(found))
        seconds = 2 * _REACH_SECONDS * (1 + len(hosts) / _THREADS)
        if own.rank == 0:
            _tell(store, _VERDICT, lambda: _require_pairs(store, hosts, seconds))
        _hear(store, _VERDICT, 2 * seconds)


def own_address(environment: Mapping[str, str] = os.environ) -> str:
    """Where gloo will be reached: the address of the interface that is set, else the one of the host's name.

    Raises ConfigError if there is no such interface.
    """
    name = environment.get(INTERFACE, "").split(",")[0]
    if not name:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError:
            return "127.0.0.1"  # as gloo does
    interfaces = psutil.net_if_addrs()
    for family in (socket.AF_INET, socket.AF_INET6):
        for one in interfaces.get(name, ()):
            if one.family == family:
                return one.address
    raise ConfigError(
        f"{INTERFACE}={name}: {socket.gethostname()} has no such interface with an address; it has "
        f"{', '.join(sorted(interfaces))}"
    )


def _tell(store: dist.Store, key: str, find: Callable[[], object]) -> None:
    """On rank 0: send all ranks the result, or the user's error."""
    try:
        told: dict[str, object] = {"found": find()}
    except (ConfigError, NetworkError) as error:
        told = {"error": str(error), "is_config": isinstance(error, ConfigError)}
    store.set(key, json.dumps(told))


def _hear(store: dist.Store, key: str, seconds: float) -> Any:
    """What rank 0 sends. Raises its error, or NetworkError if it sends nothing."""
    if _absent(store, [key], seconds):
        raise NetworkError("the first host (rank 0) has stopped answering")
    told = json.loads(store.get(key))
    if "error" in told:
        raise (ConfigError if told["is_config"] else NetworkError)(told["error"])
    return told["found"]


def _hosts(store: dist.Store, own: Guest, seconds: float) -> list[dict[str, object]]:
    """The first rank of each host, once all ranks are there; none if all are on one host."""
    keys = [_GUEST.format(rank) for rank in range(own.world_size)]
    absent = [str(keys.index(key)) for key in _absent(store, keys, seconds)]
    if absent:
        raise NetworkError(
            f"{len(absent)} of {own.world_size} ranks were not there within {seconds:.0f} s: rank {_few(absent)}; "
            "see what their hosts printed"
        )
    hosts: dict[tuple[str, str], Guest] = {}
    for key in keys:
        guest = Guest(**json.loads(store.get(key)))
        if guest.world_size != own.world_size:
            raise ConfigError(
                f"rank 0 was started for {own.world_size} ranks, but {guest.name} for {guest.world_size}: start all "
                "ranks with one launcher"
            )
        hosts.setdefault((guest.host, guest.address), guest)
    if len(hosts) == 1:
        return []
    for guest in hosts.values():
        if guest.address.startswith("127.") or guest.address == "::1":
            raise ConfigError(
                f"{guest.host} is {guest.address} to itself, where no other host reaches it: set {INTERFACE} on every "
                "host to the interface that connects the hosts, such as eth0, or correct /etc/hosts"
            )
    return [asdict(guest) for guest in hosts.values()]


def _require_pairs(store: dist.Store, hosts: Sequence[Guest], seconds: float) -> None:
    """On rank 0. Raises NetworkError if two hosts do not reach each other."""
    keys = {_REACHED.format(guest.rank): guest for guest in hosts}
    silent = _absent(store, list(keys), seconds)
    found = [f"{keys[key].name} has stopped answering" for key in silent]
    found += [said for key in keys if key not in silent for said in json.loads(store.get(key))]
    if found:
        raise NetworkError(
            f"{_few(found, '; ')}. Every host must reach every other at any port: look for firewalls and cables, and "
            f"set {INTERFACE} to the interface that connects the hosts"
        )


@contextmanager
def _answering() -> Iterator[int]:
    """A port at which this process answers, from a thread of its own, until the end of the block."""
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=has_both) as server:
        thread = threading.Thread(target=_answer, args=(server,), name="rendezvous", daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer(server: socket.socket) -> None:
    with suppress(OSError):  # the end of the block
        while True:
            connection, _ = server.accept()
            with connection, suppress(OSError):  # the other one has gone
                connection.sendall(_HELLO)


def _unreachable(own: Guest, others: Iterable[Guest]) -> list[str]:
    """What keeps this host from others, one sentence each."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return [said for said in pool.map(lambda other: _try(own, other), others) if said]


def _try(own: Guest, other: Guest) -> str:
    try:
        with socket.create_connection((other.address, other.port), timeout=_REACH_SECONDS) as connection:
            if connection.recv(len(_HELLO), socket.MSG_WAITALL) == _HELLO:
                return ""
            reason = "another program answers"
    except OSError as error:
        reason = error.strerror or str(error)
    return f"{own.name} does not reach {other.name} at port {other.port}: {reason}"


def _absent(store: dist.Store, keys: list[str], seconds: float) -> list[str]:
    """Those of `keys` that are not set within `seconds`."""
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return [key for key in keys if not store.check([key])]
    return []


def _few(names: Sequence[str], separator: str = ", ") -> str:
    more = len(names) - _FEW
    return separator.join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")
