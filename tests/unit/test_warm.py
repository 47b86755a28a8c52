"""A warm process is as a cold one in what a program sees and in how it ends. Which commands stay cold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.distributed.ranks import REPOSITORY, cpu_environment
from tests.support.runs import finish, python, start
from tests.support.warm import WarmProcess, popen

# What a program can see of its surroundings and pass on to workers.
_SEEN = """
import atexit, json, multiprocessing, os, random, signal, sys, tempfile

def double(number):
    return 2 * number, os.getcwd(), sys.argv

if __name__ == "__main__":
    found = {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "file": __file__, "cwd": os.getcwd(),
        "environment": dict(os.environ), "main": sys.modules["__main__"].__dict__ is globals(), "spec": __spec__,
        "parent": multiprocessing.parent_process(), "method": multiprocessing.get_start_method(),
        "handlers": [str(signal.getsignal(one)) for one in sorted(signal.valid_signals())],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "files": [n for n in range(256) if os.path.exists(f"/proc/self/fd/{n}")],
        "threads": len(os.listdir("/proc/self/task")), "leader": os.getsid(0) == os.getpid(),
        "folder": tempfile.gettempdir(), "umask": os.umask(0o22), "buffered": sys.stdout.line_buffering,
    }
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.map(double, [1, 2])
    print(json.dumps(found))
    atexit.register(print, "at the end")
"""


def both(command, **options):
    """The process started warm, then cold, with what they wrote."""
    options = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": cpu_environment(), **options}
    warm, cold = (popen(command, cold, **options) for cold in (False, True))
    assert isinstance(warm, WarmProcess) and not isinstance(cold, WarmProcess)
    return [(process, *process.communicate(timeout=120)) for process in (warm, cold)]


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc: open files of processes were not compared")
def test_a_program_sees_the_same(tmp_path):
    (tmp_path / "program.py").write_text(_SEEN)
    environment = cpu_environment(PYTHONPATH=os.pathsep.join([str(REPOSITORY), "nearby"]), TMPDIR=str(tmp_path))
    found = both(
        python("program.py", "--a", "b"), cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    for process, _, err in found:
        assert process.returncode == 0, err
    (warm, warm_end), (cold, cold_end) = (out.splitlines() for _, out, _ in found)
    warm, cold = json.loads(warm), json.loads(cold)
    warm["path"] = [entry for entry in warm["path"] if not entry.endswith("_vendor")]  # setuptools, once imported
    assert warm == cold and warm_end == cold_end == "at the end"


# The handler is set because jobs in the background of a shell are started with the signal ignored.
_INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("print('lost if it is not written at the end')", 0),
        ("raise SystemExit(3)", 3),
        ("import sys; sys.exit('a reason')", 1),
        ("import os; print('never written'); os._exit(4)", 4),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os; os.write(2, os.pread(0, 4, 0) + b'\\n'); import nowhere_to_be_found", 1),
        (_INTERRUPTED, -signal.SIGINT),
        ("import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()", 0),
    ],
)
def test_a_program_ends_the_same(program, status, tmp_path):
    (tmp_path / "input").write_text("some\ninput")
    with (tmp_path / "input").open() as first:
        warm, cold = both(python("-c", program), stdin=first)
    assert warm[0].returncode == cold[0].returncode == status
    assert warm[1] == cold[1]
    warm_errors, cold_errors = warm[2].splitlines(), cold[2].splitlines()
    if "Traceback (most recent call last):" in cold_errors:  # it shows the server's lines too
        warm_errors = [line for line in warm_errors if line in cold_errors]
    assert warm_errors == cold_errors


def test_a_module_runs_as_with_python_m():
    (_, warm, _), (_, cold, _) = both(python("-m", "tests.distributed.with_stacks", "-h"), env=cpu_environment())
    assert warm == cold
    told = [process.returncode for process, _, _ in both(python("-m", "json.tool", "/no/such/file"))]
    assert told[0] == told[1] != 0


def test_random_numbers_differ():
    program = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (finish(start(python("-c", program))).out.split() for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (["-c", "0"], {"OMP_NUM_THREADS": "2"}),
        (["-c", "0"], {"DS_ACCELERATOR": "cuda"}),
        (["-c", "0"], {"CUDA_VISIBLE_DEVICES": "0"}),
        (["-c", "0"], {"TORCH_CPP_LOG_LEVEL": "INFO"}),
        (["-c", "0"], {"PYTHONHASHSEED": "0"}),
        (["-u", "-c", "0"], {}),
        (["no_such_file.py"], {}),
    ],
)
def test_what_libraries_cannot_hear_any_more_starts_cold(command, environment):
    process = start(python(*command), **environment)
    assert not isinstance(process, WarmProcess)
    finish(process)


def test_what_the_tests_import_does_not_make_starts_cold():
    """Importing libraries sets variables in this process, which its children inherit."""
    import deepspeed  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import launch.train  # noqa: F401
    from dsmoe_vl.parallel.process_group import start_process_group  # noqa: F401

    process = start(python("-c", "0"))
    assert isinstance(process, WarmProcess) and finish(process).status == 0


def test_signals_and_groups():
    process = start(python("-c", "import time; print('here', flush=True); time.sleep(600)"))
    assert isinstance(process, WarmProcess) and process.stdout.readline() == "here\n"
    assert process.poll() is None and os.getpgid(process.pid) == process.pid
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == process.poll() == finish(process).status == -signal.SIGTERM


def test_processes_end_with_the_tests():
    """Also where nothing is run at the end of the process that started them."""
    program = (
        "import os; from tests.support.runs import python, start\n"
        "one = start(python('-c', 'import time; time.sleep(600)'))\n"
        "print(one.pid, psutil.Process(one.pid).ppid(), flush=True); os._exit(0)"
    )
    result = finish(start(python("-c", f"import psutil; {program}"), cold=True, PYTHONPATH=str(REPOSITORY)))
    left = [psutil.Process(int(pid)) for pid in result.out.split() if psutil.pid_exists(int(pid))]
    assert result.status == 0 and not psutil.wait_procs(left, 10)[1]
