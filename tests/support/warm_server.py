"""The server of tests.support.warm, a program: imports the libraries, then forks a child for each request.

A request is a byte with four descriptors: the child's standard input, output and error, and a connection. Through that,
the child reads what to run, as JSON up to the end, and says its process id; the server says how it ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import site
import socket
import sys
import tempfile
import types
from pathlib import Path

# What most programs import and does not change with this repository, of which nothing is imported here.
_PRELOADED = (
    "torch", "deepspeed", "numpy", "torch._dynamo", "torch.utils.cpp_extension", "torch.utils.tensorboard", "av",
    "PIL.Image", "safetensors.torch", "sentencepiece", "webdataset", "psutil", "fsspec", "tqdm",
)  # fmt: skip


def serve(requests: socket.socket) -> tuple[socket.socket, list[int]]:
    """Fork a child for each request. Returns only in a child: its connection and its files.

    As in the program that it becomes, nothing else of the server is open in it, and signals do what they do there.
    """
    for name in _PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or every child would look at all objects of the libraries when it ends: a second
    told: dict[int, socket.socket] = {}
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the tests end, and then the connection
    while True:
        ready, _, _ = select.select([requests.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with contextlib.suppress(OSError), told.pop(ended[0]) as connection:
                        connection.send(b"%8d" % ended[1])
        if requests.fileno() in ready:
            request, files, _, _ = socket.recv_fds(requests, 1, 4)
            if not request:
                _kill(list(told))
                os._exit(0)
            *files, number = files
            connection = socket.socket(fileno=number)
            if child := os.fork():
                told[child] = connection
                for file in files:
                    os.close(file)
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, interrupt)
            for other in (requests, *told.values()):
                other.close()
            os.close(woken)
            os.close(waker)
            return connection, files


def _kill(children: list[int]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            kill = os.killpg if os.getpgid(child) == child else os.kill
            kill(child, signal.SIGKILL)


def become(connection: socket.socket, files: list[int]) -> None:
    """Be the process that was asked for, and run its program in a new module `__main__`."""
    with connection:
        job = json.loads(connection.makefile("rb").read())
        if job["session"]:
            os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        connection.send(b"%8d" % os.getpid())
    words, environment = job["words"], job["environment"]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(job["cwd"])
    multiprocessing.process.ORIGINAL_DIR = job["cwd"]  # type: ignore[attr-defined]  # of workers that are spawned
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()  # Python's own is seeded anew at a fork
    before = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = ["", *before, *(entry for entry in sys.path[1:] if entry not in before)]
    site.execsitecustomize()
    sys.orig_argv = [sys.executable, *words]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-m":
        sys.argv, sys.path[0] = ["-m", *words[2:]], job["cwd"]
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
        return
    if words[0] == "-c":
        sys.argv, code, name = ["-c", *words[2:]], words[1].encode(), "<string>"
    else:
        sys.argv, sys.path[0], name = words, os.path.dirname(os.path.realpath(words[0])), os.path.abspath(words[0])
        main.__file__, code = name, Path(name).read_bytes()
    exec(compile(code, name, "exec", dont_inherit=True), vars(main))


if __name__ == "__main__":
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
