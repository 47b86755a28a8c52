"""Rank, world size and local rank under every launcher."""

import pytest

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.ranks import Ranks, first_port


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (1, 2, 1),
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, (2, 4, 0)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, (9, 16, 1)),
        (
            {
                "SLURM_STEP_ID": "3",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "0",
            },
            (0, 1, 0),
        ),  # a step of one task in a job of eight
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, (0, 1, 0)),  # a batch script outside of srun is one process
    ],
)
def test_discovery(environment, expected):
    ranks = Ranks.discover(environment)
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == expected


@pytest.mark.parametrize(
    ("environment", "name", "launcher"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two'", "deepspeed or torchrun"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=''", "deepspeed or torchrun"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'", "deepspeed or torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK=''", "deepspeed or torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE='1.5'", "torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE='x'", "Open MPI"),
        ({"PMI_RANK": "0x1", "PMI_SIZE": "2"}, "PMI_RANK='0x1'", "MPICH"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2(x3)"},
            "SLURM_NTASKS_PER_NODE='2(x3)'",
            "srun",
        ),
    ],
)
def test_a_variable_that_is_no_number_is_named(environment, name, launcher):
    with pytest.raises(ConfigError) as raised:
        Ranks.discover(environment)
    assert str(raised.value).startswith(f"{name} in the environment is not a whole number: ")
    assert launcher in str(raised.value)


@pytest.mark.parametrize("port", ["", "http", "29500.0", "70000", "-1", "0"])
def test_a_port_that_is_none_is_named(port):
    assert first_port({"MASTER_PORT": "29501"}) == 29501 and first_port({}) == 29500
    assert first_port({"MASTER_PORT": "0"}, least=0) == 0
    with pytest.raises(ConfigError, match=rf"^MASTER_PORT={port} is not a port"):
        first_port({"MASTER_PORT": port})


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(ConfigError, match="RANK=2 is not below WORLD_SIZE=2"):
        Ranks.discover({"RANK": "2", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, (2, False)),  # deepspeed
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, (4, False)),  # torchrun
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (2, True)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "3"}, (3, True)),
        (
            {
                "SLURM_STEP_ID": "3",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_NTASKS": "8",
                "SLURM_NTASKS_PER_NODE": "8",
            },
            (1, False),
        ),  # a step of one task in a job of eight a node
        ({}, (1, False)),
    ],
)
def test_ranks_of_a_host_and_mpi(environment, expected):
    ranks = Ranks.discover(environment)
    assert (ranks.local_size, ranks.starts_mpi) == expected
