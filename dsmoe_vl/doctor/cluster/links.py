"""Latency and bandwidth of collectives, link by link: inside each host, between each two hosts, over all ranks.

Each link has a process group of its own with a time limit, so a pair that cannot talk is named and the others are still
measured. Pairs of hosts are measured in rounds, in which every host is in one pair at most.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsmoe_vl.data.background import BackgroundThread
from dsmoe_vl.doctor.cluster.findings import ALL_HOSTS, Finding, Level
from dsmoe_vl.doctor.cluster.host_facts import HostFacts
from dsmoe_vl.doctor.cluster.one_host import asked_interfaces, matches
from dsmoe_vl.doctor.cluster.rendezvous import Member, Rendezvous

_BYTES = 2**24  # of each rank in a collective whose bandwidth is measured
_WARM, _TURNS, _SMALL_TURNS = 1, 3, 30
_GROUP_SECONDS, _LINK_SECONDS = 10.0, 20.0  # for one collective, for one link
_ALL_SECONDS = 30.0  # after which no other round begins
_FEW = 3  # errors in a message
_LEAST_SHARE = 0.3  # of the expected bandwidth
_MOST_SECONDS = 2e-3  # of latency between hosts in one room


@dataclass(frozen=True)
class Link:
    """Ranks that exchange data: `hosts` are one, two, or those of all ranks."""

    hosts: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        if len(self.hosts) == 1:
            return f"inside {self.hosts[0]}"
        return " - ".join(self.hosts) if len(self.hosts) == 2 else f"all {len(self.ranks)} ranks"


@dataclass(frozen=True)
class Speed:
    """latency: seconds of an all-reduce of one number. all_reduce, all_to_all: bytes per second that a rank sends."""

    latency: float
    all_reduce: float
    all_to_all: float


def rounds(members: Sequence[Member]) -> Iterator[list[Link]]:
    """The links, in rounds of links that share no rank: inside hosts, between two hosts (a round-robin tournament),
    between all ranks if that is none of them."""
    of_host: dict[str, list[int]] = {}
    for member in members:
        of_host.setdefault(member.host, []).append(member.rank)
    inside = [Link((host,), tuple(ranks)) for host, ranks in of_host.items() if len(ranks) > 1]
    if inside:
        yield inside
    circle: list[str | None] = [*of_host, *([None] if len(of_host) % 2 else [])]
    for _ in range(len(circle) - 1 if len(of_host) > 1 else 0):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        yield [
            Link((one, other), (of_host[one][0], of_host[other][0]))
            for one, other in pairs
            if one and other is not None
        ]
        circle = [circle[0], circle[-1], *circle[1:-1]]
    if len(of_host) > 1 and len(members) > 2:
        yield [Link(tuple(of_host), tuple(member.rank for member in members))]


def measure_links(meeting: Rendezvous, members: Sequence[Member], device: str) -> dict[Link, Speed | str | None]:
    """Measure all links; every rank calls it. The result is rank 0's: a speed, why it failed, or None where
    there was no time. Raises ConfigError if rank 0 goes away."""
    found: dict[Link, Speed | str | None] = {}
    present, until = [member.rank for member in members], time.monotonic() + _ALL_SECONDS
    stopped = False
    for number, links in enumerate(rounds(members)):
        meeting.put(f"round {number}", "")
        if meeting.ranks.rank == 0:
            there = meeting.collect(f"round {number}", present, _LINK_SECONDS)
            stopped = stopped or len(there) < len(present) or time.monotonic() > until or _has_failed(found, links)
            meeting.tell(f"go {number}", "stop" if stopped else "go")
        if meeting.hear(f"go {number}") == "stop":
            found |= dict.fromkeys(links)
            continue
        for link in links:
            if meeting.ranks.rank in link.ranks:
                meeting.put(link.name, _measure(meeting, link, device))
        if meeting.ranks.rank == 0:
            found |= {link: _outcome(meeting, link) for link in links}
    return found


def _has_failed(found: Mapping[Link, object], links: Sequence[Link]) -> bool:
    """Whether the link of all ranks is next, which cannot work if one of two hosts has failed."""
    return len(links[0].hosts) > 2 and any(isinstance(outcome, str) for outcome in found.values())


def _measure(meeting: Rendezvous, link: Link, device: str) -> str:
    """As JSON: a Speed, or the reason why there is none. In a thread: not every failure of a network ends by itself."""
    thread = BackgroundThread[Speed]()
    try:
        return json.dumps(asdict(thread.submit(lambda: _speed(meeting, link, device)).result(_LINK_SECONDS)))
    except TimeoutError:
        return json.dumps({"error": f"no end within {_LINK_SECONDS:.0f} s"})
    except Exception as error:  # torch's errors of a network have many types
        return json.dumps({"error": str(error).partition("\n")[0]})


def _speed(meeting: Rendezvous, link: Link, device: str) -> Speed:
    store = dist.PrefixStore(link.name, meeting.store)
    rank, size, limit = link.ranks.index(meeting.ranks.rank), len(link.ranks), timedelta(seconds=_GROUP_SECONDS)
    group: Any
    if device == "cuda":
        torch.cuda.set_device(meeting.ranks.local_rank)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, limit)
    number = torch.zeros(1, device=device)
    whole = torch.zeros(_BYTES // 4 // size * size, device=device)
    received = torch.empty_like(whole)

    def timed(call: Any, turns: int) -> float:
        for _ in range(_WARM):
            call().wait()
        group.allreduce([number]).wait()  # all begin together
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(turns):
            call().wait()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / turns

    latency = timed(lambda: group.allreduce([number]), _SMALL_TURNS)
    reduced = timed(lambda: group.allreduce([whole]), _TURNS)
    exchanged = timed(lambda: group.alltoall_base(received, whole, [], []), _TURNS)
    sent = whole.nbytes * (size - 1) / size
    return Speed(latency, 2 * sent / reduced, sent / exchanged)


def _outcome(meeting: Rendezvous, link: Link) -> Speed | str:
    """By the slowest rank, or the first errors."""
    of_ranks = meeting.collect(link.name, list(link.ranks), _LINK_SECONDS + 5)
    tables = {rank: json.loads(text) for rank, text in of_ranks.items()}
    errors = {rank: table["error"] for rank, table in tables.items() if "error" in table}
    errors |= dict.fromkeys(set(link.ranks) - tables.keys(), "no answer")
    if errors:
        return "; ".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())[:_FEW])
    return Speed(
        max(table["latency"] for table in tables.values()),
        min(table["all_reduce"] for table in tables.values()),
        min(table["all_to_all"] for table in tables.values()),
    )


def judge_links(found: Mapping[Link, Speed | str | None], facts: Mapping[str, HostFacts]) -> Iterator[Finding]:
    """Each link's speed beside what its hosts let expect. `facts`: by host."""
    for link, speed in found.items():
        between = len(link.hosts) > 1
        host = ALL_HOSTS if between else link.hosts[0]
        if speed is None:
            text = f"{link.name} not checked: another link has failed, or there was no time left"
            yield Finding("warning", host, "link", text)
        elif isinstance(speed, str):
            who = " and ".join(link.hosts) if len(link.hosts) == 2 else f"the ranks {link.name}"
            fix = "open TCP ports between them; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the right network"
            yield Finding("problem", host, "link", f"{who} cannot talk: {speed}", fix)
        else:
            expected, source = expected_rate(link, facts)
            level: Level = "ok"
            fix = ""
            if between and expected and min(speed.all_reduce, speed.all_to_all) < _LEAST_SHARE * expected:
                level, fix = "warning", "see which network is used: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
            if between and speed.latency > _MOST_SECONDS:
                level, fix = "warning", "see that the hosts are in one network, and that nothing else uses it"
            text = (
                f"{link.name}: all-reduce {_rate(speed.all_reduce)}, all-to-all {_rate(speed.all_to_all)} (expected: "
                f"{f'up to {_rate(expected)}, ' if expected else 'unknown, '}{source}), latency "
                f"{speed.latency * 1e6:,.0f} us (expected: {'below 2,000 us' if between else 'unknown'})"
            )
            yield Finding(level, host, "link", text, fix)


def expected_rate(link: Link, facts: Mapping[str, HostFacts]) -> tuple[float, str]:
    """Bytes per second that the slowest part lets expect, 0 if unknown, and what that is."""
    known = [facts[host] for host in link.hosts if host in facts]
    if len(link.hosts) == 1:
        if not known or known[0].device == "cuda" or not known[0].copy_rate:
            return 0.0, "NVLink or PCIe" if known and known[0].device == "cuda" else "memory of one host"
        return known[0].copy_rate, "a copy in memory"
    if len(known) < len(link.hosts):
        return 0.0, "an interface of unknown speed"
    if all(one.device == "cuda" and one.infiniband for one in known):
        return min(max(one.infiniband) for one in known) * 1e9 / 8, "InfiniBand"
    speeds = [_interface(one) for one in known]
    name, megabits = min(speeds, key=lambda one: one[1])
    return (megabits * 1e6 / 8, f"interface {name}") if megabits else (0.0, f"interface {name or 'unknown'}")


def _interface(facts: HostFacts) -> tuple[str, int]:
    """The interface that collectives use, as far as this can be seen, and its megabits per second."""
    variable = "NCCL_SOCKET_IFNAME" if facts.device == "cuda" else "GLOO_SOCKET_IFNAME"
    asked = asked_interfaces(facts.environment.get(variable, ""))
    for one in facts.interfaces or ():
        if any(matches(one.name, name, variable) for name in asked) or (
            not asked and facts.own_address in one.addresses
        ):
            return one.name, one.megabits
    return "", 0


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second >= 1e9 else f"{bytes_per_second / 1e6:.0f} MB/s"
