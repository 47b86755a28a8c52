"""launch/slurm/train.sbatch under a real Slurm: a controller and two nodes, hosts of tests/support/hosts.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest

from dsmoe_vl.checkpoint.store import newest_complete
from tests.distributed.ranks import REPOSITORY
from tests.support.hosts import two_hosts
from tests.support.runs import TRAIN, curve, finish, metrics, python

pytestmark = pytest.mark.long
SECONDS = 900  # for one thing to happen, also on a busy machine
SBATCH = REPOSITORY / "launch" / "slurm" / "train.sbatch"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_CONF = """
ClusterName=test
SlurmctldHost=host-1
SlurmUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
MpiDefault=none
KillWait=120
ReturnToService=2
GresTypes=gpu
NodeName=host-[1-2] CPUs=1 Gres=gpu:1
PartitionName=test Nodes=ALL Default=YES
"""


class Slurm:
    """A running Slurm and its commands, on the first host."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder = hosts, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_PORT": "29777"}
        self.environment["PYTHONPATH"] = str(REPOSITORY)
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        for host in hosts.hosts:
            host.run("mkdir", "-p", "-m", "0755", "/run/munge")
            # --force: the folder may be in one that everybody writes to
            munge = (f"--{name}-file={folder}/{host.name}.{name}" for name in ("log", "seed"))
            host.run("munged", "--force", f"--key-file={folder}/munge.key", "--pid-file=/run/munge.pid", *munge)
        self._daemon(hosts.first, "slurmctld")
        for host in hosts.hosts:
            self._daemon(host, "slurmd", "-N", host.name)

    def _daemon(self, host, name, *options):
        log = self.folder / f"{name}.{host.name}.log"
        host.run("env", f"SLURM_CONF={self.folder}/slurm.conf", name, *options, "-L", log)

    def start(self, *command):
        return self.hosts.first.start(command, **self.environment)

    def run(self, *command):
        result = finish(self.start(*command), 60)
        assert result.status == 0, f"{command}: {result.out}{result.err}{self.logs()}"
        return result.out

    def submit(self, tiny, run, *more):
        """The number of a job of two ranks, one on each node."""
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={run}.log")
        return self.run("sbatch", "--parsable", *sizes, SBATCH, *tiny.arguments(run, *more)).strip()

    def wait(self, condition, what):
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.run('scontrol', 'show', 'job')}{self.logs()}"
            time.sleep(0.5)

    def state(self, job):
        found = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))
        return found[1]

    def logs(self):
        return "".join(path.read_text()[-3000:] for path in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    absent = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        pytest.skip(f"no {', '.join(absent)} (Debian: slurm-wlm munge): train.sbatch was not checked under Slurm")
    folder = tmp_path_factory.mktemp("slurm")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        try:
            started = Slurm(hosts, folder)
            started.wait(lambda: started.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, "two nodes")
        except (AssertionError, subprocess.SubprocessError) as error:
            pytest.skip(f"Slurm does not start here, so train.sbatch was not checked under it: {error}")
        yield started


@pytest.mark.timeout(2500)
def test_a_job_on_two_nodes_trains_as_on_one_host(slurm, tiny, trained, tmp_path):
    run = tmp_path / "run"
    job = slurm.submit(tiny, run)
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "NODE_FAIL"), "the end of the job")
    printed = run.with_suffix(".log").read_text()
    assert slurm.state(job) == "COMPLETED", printed + slurm.logs()
    assert curve(run) == curve(trained)


@pytest.mark.timeout(2500)
def test_a_job_that_is_put_back_into_the_queue_goes_on_from_its_checkpoint(slurm, tiny, tmp_path):
    run = tmp_path / "run"
    log = run.with_suffix(".log")
    job = slurm.submit(
        tiny, run, "run.checkpoint_every=4", "run.steps=100000", "run.evaluate_every=0", "run.samples_every=0"
    )
    slurm.wait(lambda: (run / "checkpoints").exists() and newest_complete(run / "checkpoints"), "a checkpoint")
    slurm.run("scontrol", "requeue", job)
    # Slurm begins the job's log anew.
    slurm.wait(lambda: re.search(r"resumed at step \d+\n", log.read_text()), "the second start")
    resumed = int(re.search(r"resumed at step (\d+)\n", log.read_text())[1])
    slurm.wait(lambda: metrics(run)[-1]["step"] > resumed, "a step after it")
    slurm.run("scancel", "--signal=TERM", job)
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", "the end of the job")
    assert "stopped at step " in log.read_text()
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.parametrize(
    ("mpi", "reason"),
    [
        ("none", "rank 0 of 2 does not know the first host: MASTER_ADDR is not set"),
        ("pmi2", "the launcher announced 2 ranks, but MPI knows of 1"),
    ],
)
def test_srun_alone_is_an_error_and_not_two_runs(slurm, tiny, tmp_path, mpi, reason):
    run = tmp_path / "run"
    command = ("srun", f"--mpi={mpi}", "-N2", "-n2", *python(TRAIN, *tiny.arguments(run)))
    result = finish(slurm.start(*command), SECONDS)
    assert result.status == 2 and reason in result.err, result.out + result.err
    assert not run.exists()


def test_srun_with_the_first_host_trains(slurm, tiny, tmp_path):
    run = tmp_path / "run"
    command = ("srun", "--mpi=pmi2", "-N2", "-n2", *python(TRAIN, *tiny.arguments(run, "run.steps=2")))
    slurm.environment["MASTER_ADDR"] = "host-1"
    try:
        result = finish(slurm.start(*command), SECONDS)
    finally:
        del slurm.environment["MASTER_ADDR"]
    assert result.status == 0, result.out + result.err
    assert metrics(run)[-1]["step"] == 2
