"""The message about a run that makes no progress: which rank stopped, and where the others are."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

import psutil
import pytest

from dsmoe_vl.training.stall import Status, lost_store, message

RANKS = 4


def status(rank, phase="exchange of counts of step 12", passed=50, **values):
    return Status(rank, "node", 100 + rank, 0.0, phase, passed, **{"in_collective": True, "stalled": True, **values})


def ranks(*changed):
    """All ranks in the same collective, but for some."""
    return {rank: status(rank) for rank in range(RANKS)} | {one.rank: one for one in changed}


def test_a_silent_rank():
    text = message(ranks(status(2, "forward of step 11", 47, stalled=False, keys=("a", "b"), samples=2)), RANKS, 600)
    assert text == (
        "no rank has made progress for 600 s: rank 2 (pid 102 on node) does not run: its process or its host has "
        "stopped, or the network between them; last heard in: forward of step 11. "
        "The others are in: exchange of counts of step 12. Samples of that step on rank 2: a, b"
    )


def test_a_rank_that_is_behind():
    worker = "worker 1 of rank 3 (pid 9) has sent nothing for 600 s"
    behind = status(3, "wait for data of step 12", 49, waits_for=worker, stacks="run/stacks_00003.txt")
    assert message(ranks(behind, status(0, stacks="run/stacks_00000.txt")), RANKS, 600) == (
        f"no rank has made progress for 600 s: rank 3 (pid 103 on node) is behind in: wait for data of step 12; "
        f"{worker}. The others are in: exchange of counts of step 12. "
        "Stacks: run/stacks_00000.txt, run/stacks_00003.txt. "
        "If a step, an evaluation or a save may take that long, raise run.stall_seconds"
    )


def test_of_ranks_in_one_phase_the_one_outside_of_the_collective_is_behind():
    text = message(ranks(status(1, in_collective=False, keys=("a", "b", "c"), samples=8)), RANKS, 10)
    assert "10 s: rank 1 (pid 101 on node) is behind in: exchange of counts of step 12. The others are in: " in text
    assert "Samples of that step on rank 1: a, b, c and 5 more. " in text


def test_ranks_that_cannot_be_told_apart_are_counted():
    text = message(ranks(), RANKS, 10)
    assert "rank 0 (pid 100 on node) is in: exchange of counts of step 12; rank 1 " in text
    assert "rank 2 (pid 102 on node) is in: exchange of counts of step 12 and 1 more. If a step" in text


def test_a_rank_that_nobody_has_heard_of():
    text = message({rank: one for rank, one in ranks().items() if rank != 3}, RANKS, 10)
    assert "rank 3 has not been heard of. The others are in: exchange of counts of step 12" in text


def test_rank_0_that_does_not_answer():
    own = status(1, stacks="run/stacks_00001.txt")
    assert lost_store(status(0, "save of step 8"), own, 10) == (
        "no rank has made progress for 10 s: rank 0 (pid 100 on node) does not answer: its process or its host has "
        "stopped, or the network between them; last heard in: save of step 8. rank 1 (pid 101 on node) is in: exchange "
        "of counts of step 12. Stacks of a rank that runs: run/stacks_00001.txt"
    )
    assert "10 s: rank 0 does not answer: " in lost_store(None, own, 10)


@pytest.mark.parametrize(("earlier", "known"), [(0, True), (100, False)])
def test_a_process_id_that_another_process_has_now_is_not_taken_for_the_rank(earlier, known):
    own = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time() - earlier}
    one = replace(status(0), **own)
    assert replace(one, host="another").process() is None  # whose containers have the same process ids
    assert (one.process() is not None) == known
    assert ("its threads hang" in message({0: replace(one, stalled=False)}, 1, 10)) == known


def test_a_status_survives_the_store():
    one = status(1, keys=("a", "ü"), samples=5)
    assert Status.from_json(one.to_json().encode()) == one
