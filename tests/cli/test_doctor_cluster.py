"""`launch/doctor.py cluster`: alone, under launchers, over ssh. Real ranks; names take the place of hosts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from data_tools.tokenizer.train import train as train_tokenizer
from tests.distributed.ranks import REPOSITORY, cpu_environment, free_port, try_ranks
from tests.support.runs import finish, python, start
from tests.support.warm import popen

DOCTOR = REPOSITORY / "launch" / "doctor.py"
BIN = Path(python()[0]).parent
# In place of ssh: runs the command here. Before it, a host's own greeting, as many have.
SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
case "$2" in
closed) echo "closed: Permission denied (publickey)." >&2; exit 255 ;;
silent) exec sleep 600 ;;
empty) echo "$3" | sed 's#cd /[^ ]* #cd /no/such/folder #' > "$0.script"; exec sh -c "$(cat "$0.script")" ;;
esac
echo "Welcome to $2"
exec sh -c "$3"
"""

# The doctor, that waits six seconds for ranks instead of sixty.
_IMPATIENT = """
import runpy, sys
from dsmoe_vl.doctor.cluster import rendezvous
rendezvous.CONNECT_SECONDS = rendezvous.JOIN_SECONDS = 6.0
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def arguments(tiny, *more):
    return ["cluster", "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(2), *more]


def found(result, level):
    """Lines of the list at a level, without the word."""
    lines = result.out.splitlines()
    return [line.strip().removeprefix(level).strip() for line in lines if line.strip().startswith(f"{level} ")]


def assert_each_problem_is_said_once(result):
    report = result.out + result.err
    assert "Traceback" not in report, report
    assert result.out.count("doctor of ") == 1 and "\x1b" not in result.out, report


def test_one_process(tiny):
    result = finish(start(python(DOCTOR, *arguments(tiny)), cold=True, MASTER_PORT=str(free_port())), 280)
    assert_each_problem_is_said_once(result)
    assert result.status == 0 and not found(result, "problem"), result.out + result.err
    ok = "\n".join(found(result, "ok"))
    for check in ("versions", "accelerators", "memory", "/dev/shm", "run folder", "open files", "interfaces", "port"):
        assert check in ok
    assert "tokenizer and 4 manifests can be read" in ok and "one process has none" in ok
    assert "one reader reads" in ok


def deepspeed(port, command):
    return [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", port, *command]


def torchrun(port, command):
    return [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", port, *command]


def mpirun(port, command):
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    return [BIN / "mpirun", *options, *python(*command)]


@pytest.mark.parametrize("launcher", [deepspeed, pytest.param(torchrun, marks=pytest.mark.long), mpirun])
def test_two_ranks_under_a_launcher(tiny, launcher):
    port = free_port()
    environment = {"MASTER_PORT": str(port)} if launcher is mpirun else {}
    result = finish(start(launcher(port, [DOCTOR, *arguments(tiny)]), **environment), 280)
    assert_each_problem_is_said_once(result)
    assert result.status == 0, result.out + result.err
    assert "doctor of 2 of 2 ranks on 1 host" in result.out and "and a world size of 2: EP 2" in result.out
    link = next(line for line in found(result, "ok") if line.startswith("link"))
    assert f"inside {socket.gethostname()}: all-reduce " in link and "(expected: up to " in link


def two_hosts(tiny, *more, folders=(), **environment):
    """Rank 0 on host "a", rank 1 on host "b", as a launcher without local ranks starts them."""
    port = str(free_port())
    processes = []
    for rank, name in enumerate("ab"):
        own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = python(DOCTOR, *arguments(tiny, "--name", name, *more))
        processes.append(
            popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                cwd=folders[rank] if folders else REPOSITORY,
                env=cpu_environment(**own, **environment.get(name, {}), PYTHONPATH=str(REPOSITORY)),
            )
        )  # fmt: skip
    return [finish(process, 280) for process in processes]


def test_two_hosts_that_differ(tiny, tmp_path):
    """In their tokenizer and in a manifest."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(tiny.data, folder / "data")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny.recipe.read_text().replace(str(tiny.data), "data"))
    (folders[1] / "data" / "tokenizer.model").unlink()
    train_tokenizer([tiny.data / "videos_train"], folders[1] / "data" / "tokenizer.model", vocab_size=320)
    manifest = folders[1] / "data" / "images_train" / "index.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    first, second = two_hosts(tiny, "--recipe", str(recipe), folders=folders)
    assert_each_problem_is_said_once(first)
    assert (first.status, second.status, second.out) == (1, 0, ""), first.out + first.err + second.err
    problems = found(first, "problem")
    assert any("tokenizer data/tokenizer.model is another on b" in line for line in problems), problems
    assert any("images: data/images_train is another on b" in line for line in problems), problems
    assert len(problems) == 2
    link = next(line for line in [*found(first, "ok"), *found(first, "warning")] if line.startswith("link"))
    assert "a - b: all-reduce " in link


def test_two_hosts_that_cannot_talk(tiny):
    """The store connects them; the collectives of one use an interface that is not there."""
    first, second = two_hosts(tiny, b={"GLOO_SOCKET_IFNAME": "none0"})
    assert_each_problem_is_said_once(first)
    assert (first.status, second.status) == (1, 0), first.out + first.err + second.err
    problems = "\n".join(found(first, "problem"))
    assert "a and b cannot talk" in problems and "GLOO_SOCKET_IFNAME=none0: none0 does not exist here" in problems


def test_ranks_that_do_not_come(tiny):
    """Of two worlds of two ranks, one lacks rank 1, the other rank 0: the doctor ends, and names them."""
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command = python("-c", _IMPATIENT, DOCTOR, *arguments(tiny))
    first, second = (start(command, **common, RANK=str(rank), MASTER_PORT=str(free_port())) for rank in (0, 1))
    result = finish(first, 280)
    assert_each_problem_is_said_once(result)
    assert result.status == 1 and "doctor of 1 of 2 ranks" in result.out, result.out + result.err
    [problem] = found(result, "problem")
    assert "ranks 1 have not reached" in problem and "within 6 s" in problem and "cannot talk" in problem
    assert "memory" in result.out  # the others are judged all the same
    result = finish(second, 280)
    assert result.status == 2 and "Traceback" not in result.err, result.err
    assert "rank 1 has not reached the first host at 127.0.0.1" in result.err


def test_a_port_in_use(tiny):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = finish(start(python(DOCTOR, *arguments(tiny)), MASTER_PORT=port), 280)
    assert result.status == 1
    assert [line.startswith(f"port          MASTER_PORT {port} is in use") for line in found(result, "problem")] == [
        True
    ]


def test_a_recipe_that_does_not_fit_the_world_size(tiny, tmp_path):
    config = {**json.loads(tiny.deepspeed(2).read_text()), "train_batch_size": 7}
    (tmp_path / "seven.json").write_text(json.dumps(config))
    ranks = try_ranks(DOCTOR, [*map(str, arguments(tiny)), "--deepspeed", str(tmp_path / "seven.json")], 2, 260)
    assert [rank.status for rank in ranks] == [1, 0], ranks
    assert_each_problem_is_said_once(ranks[0])
    [problem] = found(ranks[0], "problem")
    assert "train_batch_size = 7" in problem and "2 ranks" in problem


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--recipe", "no.toml"), "recipe no.toml does not exist"),
        (("--deepspeed", "no.json"), "no.json cannot be read"),
        (("run.stepz=3",), "run.stepz"),
        (("--hostfile", "no/hostfile"), "hostfile no/hostfile cannot be read"),
        (("--rates", "1e-3,1e-4"), "belong to lr"),
    ],
)
def test_what_a_user_gets_wrong(tiny, more, words):
    result = finish(start(python(DOCTOR, *arguments(tiny, *more))), 280)
    assert result.status == 2 and words in result.err and "Traceback" not in result.err, result.err
    assert result.out == ""


@pytest.fixture
def ssh(tmp_path):
    """The environment in which `ssh` is a script."""
    script = tmp_path / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text(SSH)
    script.chmod(0o755)
    return {
        "PATH": f"{script.parent}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}",
        "MASTER_PORT": str(free_port()),
    }


def test_hosts_of_a_hostfile(tiny, tmp_path, ssh):
    """Two that answer, one that does not let us in, one without the repository, and a bad line."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# mine\na slots=1\nb slots=1\nclosed slots=1\nempty slots=1\nbad line\n")
    result = finish(start(python(DOCTOR, *arguments(tiny, "--hostfile", hostfile)), **ssh), 280)
    assert_each_problem_is_said_once(result)
    assert result.status == 1 and "doctor of 2 of 4 hosts" in result.out, result.out + result.err
    problems = found(result, "problem")
    assert any("line 6: 'bad line' is not of the form" in line for line in problems), problems
    assert any("closed: Permission denied" in line for line in problems) and "ssh-copy-id closed" in result.out
    assert any("there is no folder" in line for line in problems) and len(problems) == 3
    assert "a - b: all-reduce " in result.out and "tokenizer and manifests are the same on 2 hosts" in result.out


def test_a_hostfile_without_ssh(tiny, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=2\n")
    result = finish(start(python(DOCTOR, *arguments(tiny, "--hostfile", hostfile)), PATH=str(tmp_path)), 280)
    assert result.status == 1 and "ssh is not installed here" in result.out, result.out + result.err
    assert "not checked: the hosts that answer have no two ranks" in result.out
