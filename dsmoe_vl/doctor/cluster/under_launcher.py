"""The examination as one of several ranks: each host gathers its facts, rank 0 judges all and prints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from dsmoe_vl.doctor.cluster.between_hosts import judge
from dsmoe_vl.doctor.cluster.case import Case
from dsmoe_vl.doctor.cluster.findings import ALL_HOSTS, Finding, unchecked
from dsmoe_vl.doctor.cluster.host_facts import HostFacts
from dsmoe_vl.doctor.cluster.hostfile import Hostfile, judge_names, read_hostfile
from dsmoe_vl.doctor.cluster.links import judge_links, measure_links
from dsmoe_vl.doctor.cluster.rendezvous import FACTS_SECONDS, JOIN_SECONDS, Clock, Member, Rendezvous
from dsmoe_vl.doctor.cluster.ssh import Command, ask_all
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel.device import device_name
from dsmoe_vl.parallel.ranks import first_port

_PROBE_SECONDS = 15.0  # to see whether ssh works


def examine_as_rank(case: Case) -> int:
    """The exit status, which is 0 on other ranks than the first. Raises DsmoeVlError."""
    hostfile = None
    if case.ranks.rank == 0:  # a user's error is one of all ranks: it need not wait for them
        case.load()
        hostfile = None if case.request.hostfile is None else read_hostfile(case.request.hostfile)
    meeting = Rendezvous(case.ranks, case.host)
    if case.ranks.local_rank == 0:
        meeting.put("facts", _facts_or_error(case))
    members, told = meet(meeting)
    present = [one.rank for one in members]
    if case.ranks.rank not in present:
        return 0  # too late: rank 0 has said so
    clocks = meeting.clocks(present)
    links = measure_links(meeting, members, device_name())
    status = 0
    if case.ranks.rank == 0:
        plan, findings = case.plan(case.ranks.world_size)
        findings += _absent(case, members)
        facts, failed = _facts_of(members, told, clocks)
        counts = {host: sum(one.host == host for one in members) for host in facts}
        findings += [*failed, *judge(list(facts.values()), counts, plan)]
        if hostfile is not None:
            findings += _judge_hostfile(case, hostfile)
        findings += judge_links(links, facts)
        hosts = len({one.host for one in members})
        what = f"{len(members)} of {case.ranks.world_size} ranks on {hosts} host{'s' * (hosts > 1)}"
        status = case.report(findings, what)
    meeting.leave(present)
    return status


def meet(meeting: Rendezvous) -> tuple[list[Member], dict[int, str]]:
    """The ranks that are there, on every one of them; on rank 0 also what they say of their hosts."""
    if meeting.ranks.rank:
        return [Member(**one) for one in json.loads(meeting.hear("members"))], {}
    members = meeting.members()
    told = meeting.collect("facts", [one.rank for one in members if one.local_rank == 0], FACTS_SECONDS)
    meeting.tell("members", json.dumps([asdict(one) for one in members]))
    return members, told


def _facts_or_error(case: Case) -> str:
    try:
        return case.facts().to_json()
    except DsmoeVlError as error:
        return json.dumps({"error": str(error)})


def _facts_of(
    members: Sequence[Member], told: Mapping[int, str], clocks: Mapping[int, Clock]
) -> tuple[dict[str, HostFacts], list[Finding]]:
    """By host; and about the hosts that have none."""
    facts: dict[str, HostFacts] = {}
    failed = []
    for member in (one for one in members if one.local_rank == 0):
        text = told.get(member.rank, '{"error": "they did not arrive in time"}')
        if "error" in (values := json.loads(text)):
            problem = f"its facts could not be gathered: {values['error']}"
            failed.append(Finding("problem", member.host, "facts", problem, "make it as it is on the first host"))
        elif member.host not in facts:
            found = HostFacts.from_json(text)
            if member.rank in clocks:
                found = replace(found, **asdict(clocks[member.rank]))
            facts[member.host] = found
    for host in dict.fromkeys(one.host for one in members):
        if host not in facts and all(one.host != host for one in failed):
            failed.append(unchecked(host, "facts", "its first rank, which gathers them, is not there"))
    return facts, failed


def _absent(case: Case, members: Sequence[Member]) -> Iterator[Finding]:
    absent = sorted(set(range(case.ranks.world_size)) - {one.rank for one in members})
    if absent:
        hosts = sorted({rank // case.ranks.local_size + 1 for rank in absent})
        text = (
            f"ranks {', '.join(map(str, absent))} have not reached {case.host} within {JOIN_SECONDS:.0f} s: host "
            f"{', '.join(map(str, hosts))} of the launcher's list and {case.host} cannot talk, or they did not start"
        )
        fix = f"see that they start, and that they reach {os.environ['MASTER_ADDR']}, port {first_port()}"
        yield Finding("problem", ALL_HOSTS, "ranks", text, fix)


def _judge_hostfile(case: Case, hostfile: Hostfile) -> Iterator[Finding]:
    """What is wrong with a hostfile, ssh from this host included."""
    yield from hostfile.findings
    yield from judge_names(hostfile, case.host)
    total = sum(hostfile.slots.values())
    if hostfile.slots and total != case.ranks.world_size:
        text = f"{hostfile.path} has {total} slots, but {case.ranks.world_size} ranks were started"
        yield Finding("warning", ALL_HOSTS, "hostfile", text, "start as many, or correct the slots")
    for host, answer in ask_all(
        {host: Command(host, ("-c", "pass")) for host in hostfile.slots}, _PROBE_SECONDS
    ).items():
        yield answer.finding(host)
