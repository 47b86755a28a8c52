"""Before the first group: who is not there and who is started with another number of ranks. Before the first step: who
does not take part in a group. Hosts that do not reach each other are in test_two_hosts.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.rendezvous import own_address
from tests.distributed.ranks import REPOSITORY, cpu_environment, free_port, try_ranks
from tests.support.warm import popen

SCRIPT = Path(__file__).with_name("meeting.py")


def outputs(mode, absent=-1, ranks=2):
    """What each rank says at the end."""
    finished = try_ranks(SCRIPT, [mode, str(absent), str(ranks)], ranks)
    assert not any(one.status for one in finished), finished
    return [one.out.strip() for one in finished]


def test_ranks_of_one_host_meet():
    assert outputs("meeting", ranks=3) == ["met"] * 3


def test_a_rank_that_is_not_there_is_named():
    said = "NetworkError: 1 of 3 ranks were not there within 5 s: rank 2; see what their hosts printed"
    assert outputs("meeting", absent=2, ranks=3) == [said, said, "met"]


def test_different_numbers_of_ranks_are_refused():
    port, started = str(free_port()), []
    for rank, world_size in (("0", "2"), ("1", "3")):
        environment = cpu_environment(
            RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHONPATH=str(REPOSITORY)
        )
        command = [sys.executable, str(SCRIPT), "meeting", "-1", "2"]
        started.append(popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    for process in started:
        out = process.communicate(timeout=120)[0]
        assert out.startswith(f"ConfigError: rank 0 was started for 2 ranks, but {socket.gethostname()} (rank 1, "), out
        assert out.endswith(") for 3: start all ranks with one launcher\n")


def test_all_groups_are_used():
    assert outputs("warming") == ["met", "met"]


def test_a_rank_that_does_not_take_part_is_named():
    said, _ = outputs("warming", absent=1)
    host = socket.gethostname()
    assert said == (
        f"NetworkError: a group of 2 ranks was not ready within 10 s, on rank 0 ({host}): rank 1 ({host}) did not take "
        "part: stopped, or behind a network that fails"
    )


def test_ranks_between_which_nothing_arrives_are_named():
    said, _ = outputs("stuck", absent=1)
    host = socket.gethostname()
    assert said.endswith(f": between two of rank 0 ({host}), rank 1 ({host}), gloo does not get through")


def test_an_address_is_that_of_the_interface_that_is_set():
    assert own_address({"GLOO_SOCKET_IFNAME": "lo"}) == "127.0.0.1"
    with pytest.raises(
        ConfigError, match=r"^GLOO_SOCKET_IFNAME=ib7: .* has no such interface with an address; it has "
    ):
        own_address({"GLOO_SOCKET_IFNAME": "ib7"})
