"""Which links are measured when, and what is said of them; hostfiles; addresses."""

from __future__ import annotations

from itertools import combinations

import pytest

from dsmoe_vl.doctor.cluster.host_facts import HostFacts, Interface
from dsmoe_vl.doctor.cluster.hostfile import judge_names, passed_on, read_hostfile
from dsmoe_vl.doctor.cluster.links import Link, Speed, judge_links, rounds
from dsmoe_vl.doctor.cluster.over_ssh import own_address
from dsmoe_vl.doctor.cluster.rendezvous import Member
from dsmoe_vl.errors import ConfigError

LOOPBACK = Interface("lo", True, ("127.0.0.1",), 0)
FACTS = {
    name: HostFacts(
        name,
        interfaces=(LOOPBACK, Interface("eth0", True, (f"10.0.0.{number}",), speed)),
        own_address=f"10.0.0.{number}",
        copy_rate=8e9,
    )
    for number, (name, speed) in enumerate([("a", 10000), ("b", 1000), ("c", 0)])
}


def members(hosts, local):
    return [Member(host * local + rank, f"h{host}", rank) for host in range(hosts) for rank in range(local)]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("local", [1, 2, 3])
def test_every_pair_of_hosts_is_measured_once(hosts, local):
    found = list(rounds(members(hosts, local)))
    links = [link for of_round in found for link in of_round]
    assert len(set(links)) == len(links) and all(found)
    pairs = [frozenset(link.hosts) for link in links if len(link.hosts) == 2 and len(link.ranks) == 2]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {frozenset(pair) for pair in combinations([f"h{i}" for i in range(hosts)], 2)}
    inside = [link for link in links if len(link.hosts) == 1]
    assert len(inside) == (hosts if local > 1 else 0) and all(len(link.ranks) == local for link in inside)
    for of_round in found:  # no rank is in two links at once
        ranks = [rank for link in of_round for rank in link.ranks]
        assert len(ranks) == len(set(ranks))
    if hosts > 1 and hosts * local > 2:
        assert found[-1][0].ranks == tuple(range(hosts * local))
    assert len(found) <= 1 + max(0, hosts - 1 + hosts % 2) + 1


def judged(hosts, speed):
    [finding] = judge_links({Link(hosts, tuple(range(2))): speed}, FACTS)
    return finding


def test_a_link_as_fast_as_its_slowest_interface():
    finding = judged(("a", "b"), Speed(1e-4, 1e8, 9e7))
    assert finding.level == "ok" and "a - b: all-reduce 100 MB/s, all-to-all 90 MB/s" in finding.text
    assert "expected: up to 125 MB/s, interface eth0" in finding.text and "latency 100 us" in finding.text


def test_a_slow_link():
    finding = judged(("a", "b"), Speed(1e-4, 1e8, 2e7))
    assert finding.level == "warning" and "GLOO_SOCKET_IFNAME" in finding.fix
    assert judged(("a", "b"), Speed(5e-3, 1e8, 1e8)).level == "warning"


def test_a_link_of_unknown_speed():
    finding = judged(("a", "c"), Speed(1e-4, 1e3, 1e3))
    assert finding.level == "ok" and "expected: unknown, interface eth0" in finding.text
    assert "expected: unknown, an interface of unknown speed" in judged(("a", "d"), Speed(1e-4, 1, 1)).text


def test_inside_a_host():
    finding = judged(("a",), Speed(1e-3, 2e9, 1e9))
    assert finding.host == "a" and "inside a: all-reduce 2.00 GB/s" in finding.text
    assert "up to 8.00 GB/s, a copy in memory" in finding.text


def test_hosts_that_cannot_talk_are_named():
    finding = judged(("a", "b"), "connection refused")
    assert finding.level == "problem" and "a and b cannot talk: connection refused" in finding.text and finding.fix


def test_a_link_without_time():
    finding = judged(("a", "b"), None)
    assert finding.level == "warning" and "a - b not checked" in finding.text


def test_a_hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\n\nnode-1 slots=8\n  node-2\tslots=4 # half of it\n")
    hostfile = read_hostfile(path)
    assert hostfile.slots == {"node-1": 8, "node-2": 4}
    assert [(one.level, one.text) for one in hostfile.findings] == [("ok", f"{path}: 2 hosts, 12 ranks")]


@pytest.mark.parametrize(
    ("line", "level", "words"),
    [
        ("node-2", "problem", "'node-2' is not of the form HOST slots=N"),
        ("node-2 slots=many", "problem", "'node-2 slots=many' is not of the form"),
        ("node-2 slots = 8", "problem", "'node-2 slots = 8' is not of the form"),
        ("node-2 slots=-1", "problem", "'node-2 slots=-1' is not of the form"),
        ("node-2:8", "problem", "'node-2:8' is not of the form"),
        ("node-1 slots=8", "problem", "node-1 is named twice"),
        ("node-2 slots=0", "problem", "node-2 has slots=0"),
        ("node-2 slots=8 max_slots=9", "warning", "'max_slots=9' after the number of node-2"),
    ],
)
def test_bad_lines_of_a_hostfile(tmp_path, line, level, words):
    path = tmp_path / "hostfile"
    path.write_text(f"node-1 slots=8\n{line}\n")
    [finding] = read_hostfile(path).findings
    assert finding.level == level and f"line 2: {words}" in finding.text and finding.fix


def test_a_hostfile_without_hosts(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# nothing\n")
    [finding] = read_hostfile(path).findings
    assert finding.level == "problem" and "names no host" in finding.text
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_hostfile(path)
    with pytest.raises(ConfigError, match=r"No such file.*hostfile.example"):
        read_hostfile(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path)


def test_names_without_an_address(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("localhost slots=1\nno-such-host.invalid slots=1\n")
    [finding] = judge_names(read_hostfile(path), "here")
    assert finding.level == "warning" and "here has no address for no-such-host.invalid" in finding.text


def test_variables_for_all_hosts(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n\n# a comment\nA=b=c\n")
    here = {"PYTHONPATH": "/srv", "HOME": "/root", "GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "INFO"}
    variables, findings = passed_on(here, (tmp_path, tmp_path))
    assert variables == {"PYTHONPATH": "/srv", "GLOO_SOCKET_IFNAME": "eth0", "A": "b=c"}
    assert [one.level for one in findings] == ["problem", "problem", "warning"]
    assert "line 2: ''" in findings[0].text and findings[2].text.startswith("NCCL_DEBUG: set here")


def test_the_address_that_others_use():
    assert own_address(FACTS["b"]) == "10.0.0.1"
    two = HostFacts(
        "x",
        interfaces=(LOOPBACK, Interface("eth0", True, ("10.0.0.5",), 0), Interface("ib0", True, ("10.1.0.5",), 0)),
        environment={"GLOO_SOCKET_IFNAME": "ib0"},
    )
    assert own_address(two) == "10.1.0.5"
    assert own_address(HostFacts("node-7", interfaces=(LOOPBACK,))) == "node-7"
