"""The address of the first host: the launcher's, the user's or MPI's; and the store there."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest

from dsmoe_vl.errors import ConfigError, NetworkError
from dsmoe_vl.parallel.first_host import connect, find_first_host
from dsmoe_vl.parallel.ranks import Ranks

NAMES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing is known, and what is set is forgotten after the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_needs_no_launcher(environment):
    find_first_host(Ranks(0, 1, 0))
    store = connect(Ranks(0, 1, 0), timedelta(seconds=5))
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_several_ranks_must_be_told():
    with pytest.raises(ConfigError, match="rank 1 of 2 does not know the first host: MASTER_ADDR is not set"):
        find_first_host(Ranks(1, 2, 0))


def test_an_address_that_the_user_sets_needs_no_mpi(environment):
    """Under `srun --mpi=pmi2`, which Open MPI's mpi4py does not know."""
    environment.setenv("MASTER_ADDR", "host-1")
    find_first_host(Ranks(1, 2, 1, starts_mpi=True))
    assert [os.environ[name] for name in NAMES[:5]] == ["host-1", "29500", "1", "2", "1"]


def test_an_mpi_that_knows_of_other_ranks_is_refused(environment):
    """As under a launcher of another MPI: each process would train alone."""
    import deepspeed

    def alone(distributed_port, verbose):
        environment.setenv("WORLD_SIZE", "1")

    environment.setattr(deepspeed.comm, "mpi_discovery", alone)
    with pytest.raises(ConfigError, match="the launcher announced 4 ranks, but MPI knows of 1: mpi4py uses another"):
        find_first_host(Ranks(1, 4, 1, starts_mpi=True))


def test_a_port_in_use_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environment.setenv("MASTER_ADDR", "127.0.0.1")
        environment.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"port {port} of the first host is in use"):
            connect(Ranks(0, 2, 0), timedelta(seconds=5))


def test_a_first_host_that_does_not_answer_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    environment.setenv("MASTER_PORT", str(port))
    with pytest.raises(NetworkError, match=f"rank 1 has not reached the first host at 127.0.0.1, port {port}, in"):
        connect(Ranks(1, 2, 0), timedelta(seconds=1))
