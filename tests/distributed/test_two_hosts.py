"""Training over two hosts under every launcher: the same losses as on one; named hosts when the link is cut."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.distributed.ranks import REPOSITORY, free_port
from tests.support.datasets import photo
from tests.support.hosts import TwoHosts, two_hosts
from tests.support.runs import TRAIN, curve, finish, metrics, python

BIN = Path(python()[0]).parent
SECONDS = 600  # in which a start and 24 steps end, also on a busy machine
# What a shell would set on every host, and a launcher passes on from the first one.
PASSED = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in PASSED.items()))
    with two_hosts(folder) as found:
        yield found


def deepspeed(hosts, *options):
    """The launcher on the first host; `.deepspeed_env` is in a folder of the test. An ssh whose host has gone ends."""
    launcher = [BIN / "deepspeed", "--hostfile", hosts.hostfile, "--master_addr", hosts.first.address, *options]
    environment = {"DS_ENV_FILE": str(hosts.folder / "environment"), "PDSH_SSH_ARGS_APPEND": ALIVE}
    return lambda *command, **more: [hosts.first.start([*launcher, *command], **environment, **more)]


def pdsh(hosts, *command):
    return deepspeed(hosts)(*command)


def deepspeed_openmpi(hosts, *command):
    return deepspeed(hosts, "--launcher", "openmpi", "--launcher_args=--allow-run-as-root")(*command)


def mpirun(hosts, *command):
    """It passes on to the other host what it is told to."""
    passed = [word for name in PASSED for word in ("-x", name)]
    options = ["--allow-run-as-root", "--hostfile", hosts.hostfile, "-np", "2", *passed]
    return [hosts.first.start([BIN / "mpirun", *options, *python(*command)], **PASSED)]


def torchrun(hosts, *command):
    """On each host; the first one that comes is where they meet."""
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_id={free_port()}"]
    place = f"--rdzv_endpoint={hosts.first.address}:{free_port()}"
    return [host.start([BIN / "torchrun", *options, place, *command], **PASSED) for host in hosts.hosts]


def without_ssh(hosts, *command):
    """`deepspeed --no_ssh`, on each host."""
    options = ["--hostfile", hosts.hostfile, "--no_ssh", "--master_addr", hosts.first.address]
    return [
        host.start([BIN / "deepspeed", *options, "--node_rank", number, *command], **PASSED)
        for number, host in enumerate(hosts.hosts)
    ]


def finish_all(started, seconds=SECONDS):
    """All launchers, as one: the first status that is not 0, all that was printed."""
    ended = [finish(one, seconds) for one in started]
    status = next((one.status for one in ended if one.status), 0)
    return status, "".join(one.out for one in ended), "".join(one.err for one in ended)


def train_as_on_one_host(hosts, tiny, trained, run, launcher):
    status, out, err = finish_all(launcher(hosts, TRAIN, *tiny.arguments(run)))
    assert status == 0, out + err
    assert curve(run) == curve(trained)
    assert not [one for host in hosts.hosts for one in host.processes() if str(TRAIN) in one.cmdline()]


@pytest.mark.timeout(900)  # with the runs that it is compared with
def test_experts_on_two_hosts_train_as_on_one(hosts, tiny, trained, tmp_path):
    train_as_on_one_host(hosts, tiny, trained, tmp_path / "run", pdsh)


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("launcher", [deepspeed_openmpi, mpirun, torchrun, without_ssh])
def test_every_launcher_trains_as_on_one_host(hosts, tiny, trained, tmp_path, launcher):
    train_as_on_one_host(hosts, tiny, trained, tmp_path / "run", launcher)


def alone(hosts, *command):
    """One process on the first host."""
    return [hosts.first.start(python(*command))]


@pytest.mark.long
@pytest.mark.timeout(2000)
def test_evaluation_on_two_hosts(hosts, trained, tmp_path):
    scores = []
    for launcher in (alone, mpirun):
        run = Path(shutil.copytree(trained, tmp_path / launcher.__name__))
        options = ("--run", run, "--limit", "5", "--max-tokens", "4", "--show", "0")
        status, out, err = finish_all(launcher(hosts, REPOSITORY / "launch" / "evaluate.py", *options))
        assert status == 0, out + err
        scores.append(json.loads((run / "eval.json").read_text()))
    one, two = scores
    assert [list(tasks) for tasks in one.values()] == [list(tasks) for tasks in two.values()] != []
    for folder, tasks in one.items():
        assert all(two[folder][task] == pytest.approx(values, abs=1e-6) for task, values in tasks.items())


@pytest.mark.long
@pytest.mark.timeout(2000)
def test_a_conversion_on_two_hosts_writes_the_same_shards(hosts, tmp_path):
    for number in range(7):
        photo(tmp_path / "media" / f"{number}.jpg", (30 + number, 20))
        (tmp_path / "media" / f"{number}.txt").write_text(f"photo {number}")
    written = []
    for launcher in (alone, mpirun):
        out = tmp_path / launcher.__name__
        options = ("folder", "--media", tmp_path / "media", "--output", out, "--samples-per-shard", "2")
        status, said, err = finish_all(launcher(hosts, "-m", "data_tools.convert", *options))
        assert status == 0, said + err
        written.append({path.name: path.read_bytes() for path in out.glob("*.tar")})
    assert len(written[0]) == 4 and written[0] == written[1]


def test_hosts_that_do_not_reach_each_other_are_named(hosts, tiny, tmp_path):
    """A firewall refuses connections from the first host to the second; in the other direction they work."""
    if shutil.which("iptables") is None:
        pytest.skip("no iptables (Debian: iptables): a firewall between two hosts was not checked")
    rule = ("OUTPUT", "-d", hosts.second.address, "-p", "tcp", "--syn", "-j", "REJECT")
    hosts.first.run("iptables", "-A", *rule)
    try:
        status, out, err = finish_all(two_ranks(hosts, *tiny.arguments(tmp_path / "run")))
    finally:
        hosts.first.run("iptables", "-D", *rule)
    assert status == 1
    assert re.search(
        r"error \(rank \d\): host-1 \(rank 0, 10\.77\.0\.1\) does not reach host-2 \(rank 1, 10\.77\.0\.2\) at port "
        r"\d+: .*\. Every host must reach every other at any port: ",
        err,
    ), out + err


def two_ranks(hosts: TwoHosts, *arguments, **more):
    """Without a launcher, as a cluster that starts one container a rank."""
    common = {**PASSED, "WORLD_SIZE": "2", "MASTER_ADDR": hosts.first.address, "MASTER_PORT": str(free_port()), **more}
    return [
        host.start(python(TRAIN, *arguments), **common, RANK=str(rank), LOCAL_RANK="0", LOCAL_SIZE="1")
        for rank, host in enumerate(hosts.hosts)
    ]


def has_checkpoint(run):
    return (run / "checkpoints").exists() and newest_complete(run / "checkpoints") is not None


def wait_for(condition, started):
    """While all of them run."""
    wait_until(lambda: condition() or any(one.poll() is not None for one in started))
    assert condition(), finish_all(started, 60)


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "the time is over"
        time.sleep(0.05)


def ranks_of(hosts):
    """The processes that train, not their launchers."""
    return [one for host in hosts.hosts for one in host.processes() if "RANK" in environment_of(one)]


def environment_of(process):
    try:
        return process.environ()
    except psutil.Error:  # it has ended
        return {}


def end_all(hosts, started):
    """What they printed, whatever has become of them. Stale connections are of no use to the next test."""
    hosts.mend()
    for one in [one for host in hosts.hosts for one in host.processes() if one.name() != "sshd"]:
        one.kill()
    return finish_all(started, 60)


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("launcher", [torchrun, pdsh])
def test_a_link_that_is_cut_ends_the_ranks_of_both_hosts_and_the_same_command_goes_on(hosts, tiny, tmp_path, launcher):
    """The survivor with the store names the other rank, its host, and what they were in. pdsh ends by itself; torchrun
    on the other host waits for its own connection."""
    run = tmp_path / "run"
    often = ("run.checkpoint_every=2", "run.evaluate_every=0", "run.samples_every=0")
    arguments = tiny.arguments(run, *often, "run.stall_seconds=20", "run.steps=100000")
    started = launcher(hosts, TRAIN, *arguments)
    try:
        wait_for(lambda: has_checkpoint(run), started)
        hosts.cut()
        wait_until(lambda: not ranks_of(hosts))
        if launcher is pdsh:
            wait_until(lambda: started[0].poll() is not None)
    finally:
        status, out, err = end_all(hosts, started)
    assert status != 0
    assert re.search(
        r"error \(rank 0\): no rank has made progress for \d+ s: rank 1 \(pid \d+ on host-2\) does not run: its "
        r"process or its host has stopped, or the network between them; last heard in: \w+.* of step \d+\. "
        r"The others are in: ",
        err,
    ), out + err
    assert all((run / f"stacks_0000{rank}.txt").read_text() for rank in (0, 1))
    stopped = metrics(run)[-1]["step"] + 2
    status, out, err = finish_all(launcher(hosts, TRAIN, *arguments, f"run.steps={stopped}"))
    assert status == 0 and re.search(r"resumed at step \d+\n", out), out + err
    assert metrics(run)[-1]["step"] == stopped


@pytest.mark.long
@pytest.mark.timeout(2000)
def test_after_a_cut_the_first_host_goes_on_alone(hosts, tiny, tmp_path):
    """With --max-restarts; the other's supervisor, which decides nothing, ends."""
    run = tmp_path / "run"
    often = ("run.checkpoint_every=2", "run.evaluate_every=0", "run.samples_every=0", "run.stall_seconds=20")
    started = two_ranks(hosts, *tiny.arguments(run, *often), "--max-restarts", "1")
    try:
        wait_for(lambda: has_checkpoint(run), started)
        hosts.cut()
        first = finish(started[0], SECONDS)
    finally:
        end_all(hosts, started[1:])
    assert first.status == 0, first.out + first.err
    assert "; 1 of 2 ranks start again" in first.out and metrics(run)[-1]["step"] == 24
