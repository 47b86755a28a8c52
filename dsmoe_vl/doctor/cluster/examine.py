"""`launch/doctor.py cluster`: finds what is wrong with a cluster before a run does. Every wait in it has a limit."""

from __future__ import annotations

from dsmoe_vl.doctor.cluster.between_hosts import judge
from dsmoe_vl.doctor.cluster.case import Case, Request
from dsmoe_vl.doctor.cluster.findings import Finding
from dsmoe_vl.doctor.cluster.hostfile import read_hostfile
from dsmoe_vl.doctor.cluster.over_ssh import examine_over_ssh, send_facts, send_links
from dsmoe_vl.doctor.cluster.under_launcher import examine_as_rank
from dsmoe_vl.parallel.ranks import first_port


def examine_cluster(request: Request) -> int:
    """Examine it from this process: one of several ranks, alone with a hostfile, or alone. Returns the exit status: 1
    after a problem, 0 without one. Raises DsmoeVlError."""
    case = Case(request)
    if request.part:
        return send_facts(case) if request.part == "facts" else send_links(case)
    if case.ranks.world_size > 1:
        return examine_as_rank(case)
    if request.hostfile is not None:
        return examine_over_ssh(case, read_hostfile(request.hostfile))
    return _examine_one_host(case)


def _examine_one_host(case: Case) -> int:
    plan, findings = case.plan(1)
    findings += judge([case.facts(first_port())], {case.host: 1}, plan)
    text = "one process has none: start the doctor under a launcher, or with --hostfile"
    return case.report([*findings, Finding("ok", case.host, "link", text)], "one process")
