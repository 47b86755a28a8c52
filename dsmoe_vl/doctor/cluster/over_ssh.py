"""The examination of the hosts of a hostfile: each is asked over ssh, then ranks are started there to measure links."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

from dsmoe_vl.doctor.cluster.between_hosts import judge
from dsmoe_vl.doctor.cluster.case import Case
from dsmoe_vl.doctor.cluster.findings import ALL_HOSTS, Finding, unchecked
from dsmoe_vl.doctor.cluster.host_facts import ROOT, HostFacts
from dsmoe_vl.doctor.cluster.hostfile import Hostfile, judge_names, passed_on
from dsmoe_vl.doctor.cluster.links import Link, Speed, judge_links, measure_links
from dsmoe_vl.doctor.cluster.one_host import asked_interfaces, is_loopback
from dsmoe_vl.doctor.cluster.rendezvous import Clock, Rendezvous
from dsmoe_vl.doctor.cluster.ssh import Command, ask_all
from dsmoe_vl.doctor.cluster.under_launcher import meet
from dsmoe_vl.parallel.device import device_name
from dsmoe_vl.parallel.ranks import first_port

_ANSWER = "doctor's answer: "  # before the JSON that a host sends; its shell may print other lines
_TELL_TIME = f"import time; print({_ANSWER!r} + repr(time.time()))"
_FACTS_SECONDS, _CLOCK_SECONDS, _LINKS_SECONDS = 100.0, 15.0, 150.0
_RANKS_TO_MEASURE = 2  # of a host without GPUs


def examine_over_ssh(case: Case, hostfile: Hostfile) -> int:
    """The exit status. Raises DsmoeVlError."""
    plan, findings = case.plan(max(1, sum(hostfile.slots.values())))
    findings += [*hostfile.findings, *judge_names(hostfile, case.host)]
    variables, wrong = passed_on(os.environ)
    findings += wrong
    commands = {
        host: _command(case, host, "facts", variables | _world(0, slots, 0, slots))
        for host, slots in hostfile.slots.items()
    }
    facts: dict[str, HostFacts] = {}
    for host, answer in ask_all(commands, _FACTS_SECONDS).items():
        findings.append(answer.finding(host))
        if not answer.problem:
            facts[host] = HostFacts.from_json(_answer(answer.out))
    clocks = ask_all({host: Command(host, ("-c", _TELL_TIME)) for host in facts}, _CLOCK_SECONDS)
    for host, answer in clocks.items():
        if not answer.problem:
            clock = Clock.between(answer.asked, float(_answer(answer.out)), answer.ended)
            facts[host] = replace(facts[host], **asdict(clock))
    if facts:
        findings += judge(list(facts.values()), hostfile.slots, plan)
    findings += _links(case, hostfile, facts, variables)
    return case.report(findings, f"{len(facts)} of {len(hostfile.slots)} hosts of {hostfile.path}")


def send_facts(case: Case) -> int:
    """Be the process that a host is asked through."""
    print(_ANSWER + case.facts(first_port()).to_json(), flush=True)
    return 0


def send_links(case: Case) -> int:
    """Be a rank that measures; rank 0 sends what was found."""
    meeting = Rendezvous(case.ranks, case.host)
    meeting.put("facts", "")  # they were sent before
    members, _ = meet(meeting)
    found = measure_links(meeting, members, device_name())
    if case.ranks.rank == 0:
        sent = [
            {"link": asdict(link), "speed": asdict(speed) if isinstance(speed, Speed) else speed}
            for link, speed in found.items()
        ]
        print(_ANSWER + json.dumps(sent), flush=True)
    meeting.leave([one.rank for one in members])
    return 0


def _links(
    case: Case, hostfile: Hostfile, facts: Mapping[str, HostFacts], variables: Mapping[str, str]
) -> Iterator[Finding]:
    """Start ranks as `deepspeed` does, on the hosts that have answered, and judge what they measure."""
    sizes = {
        host: min(hostfile.slots[host], len(one.accelerators or ()) or _RANKS_TO_MEASURE) for host, one in facts.items()
    }
    places = [(host, local_rank) for host, size in sizes.items() for local_rank in range(size)]
    if len(places) < 2:
        yield unchecked(ALL_HOSTS, "link", "the hosts that answer have no two ranks")
        return
    first = next(iter(facts.values()))
    address = own_address(first) if len(facts) > 1 else "127.0.0.1"
    shared = {**variables, "MASTER_ADDR": address, "MASTER_PORT": str(first_port())}
    commands = {
        rank: _command(case, host, "links", shared | _world(rank, len(places), local_rank, sizes[host]))
        for rank, (host, local_rank) in enumerate(places)
    }
    answers = ask_all(commands, _LINKS_SECONDS)
    for (host, _), answer in zip(places, answers.values(), strict=True):
        if answer.problem:
            yield Finding("problem", host, "link", answer.problem, answer.fix)
    if not answers[0].problem:
        sent = json.loads(_answer(answers[0].out))
        found = {Link(*map(tuple, one["link"].values())): one["speed"] for one in sent}
        yield from judge_links(
            {link: Speed(**speed) if isinstance(speed, dict) else speed for link, speed in found.items()}, facts
        )


def own_address(facts: HostFacts) -> str:
    """The address by which others reach a host, as far as its facts say."""
    asked = asked_interfaces(facts.environment.get("GLOO_SOCKET_IFNAME", ""))
    used = [one for one in facts.interfaces or () if one.up and one.addresses and not is_loopback(one)]
    used.sort(key=lambda one: one.name not in asked)
    return used[0].addresses[0] if used else facts.host


def _command(case: Case, host: str, part: str, environment: Mapping[str, str]) -> Command:
    request = case.request
    options = ("--part", part, "--name", host, "--recipe", str(request.recipe), "--deepspeed", str(request.deepspeed))
    return Command(host, (str(ROOT / "launch/doctor.py"), "cluster", *options, *request.overrides), environment)


def _world(rank: int, world_size: int, local_rank: int, local_size: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank), "LOCAL_SIZE": str(local_size)
    }  # fmt: skip


def _answer(out: str) -> str:
    """The JSON in what a host has printed."""
    return next(line.removeprefix(_ANSWER) for line in out.splitlines() if line.startswith(_ANSWER))
