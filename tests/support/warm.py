"""Python processes that need not import torch and DeepSpeed again: children of a server that has imported them.

A server is started by the first test that needs one, and forks a child for each start. The child then runs the program
as Python itself would, up to its normal end. It differs from a process of its own in what its parent is, in its name
and command line as `ps` shows them, in its memory, in the modules that are imported already, and in the seed of hashes,
which it shares. A test of these, of launchers or of what a command imports starts it cold. So does a command whose
environment says anything else to the libraries that were imported than the server's did.

The server is in warm_server.py. The forkserver of `multiprocessing` is not used: its children end by os._exit and have
a parent process and a start method of their own, and how a program ends and starts workers is tested here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Variables that Python, the loader, or a library reads when it starts or is imported.
_READ_ONCE = (
    "PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "GLIBC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NPY_",
    "NUMPY_", "ATEN_", "DNNL_", "ONEDNN_", "TORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "KINETO_", "CUDA_",
    "NVIDIA_", "NCCL_", "TRITON_", "DS_", "DEEPSPEED_", "PILLOW_", "PROTOCOL_BUFFERS_", "PYDANTIC_", "FSSPEC_", "HOME",
)  # fmt: skip
# Of these, what is applied anew or read when it is used. The imports of a test leave the last two in its environment,
# and the server's own imports set them too.
_READ_LATER = ("PYTHONPATH", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK")
# As the commands of launch/ set it before they import torch.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", **_QUIET}
_SERVER = Path(__file__).with_name("warm_server.py")
_LOCK = threading.Lock()


def read_once(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process which has imported its libraries cannot change any more."""
    return {k: v for k, v in environment.items() if k.startswith(_READ_ONCE) and k not in _READ_LATER}


def popen(command: Sequence[object], cold: bool = False, **options: Any) -> subprocess.Popen[Any]:
    """As subprocess.Popen. `cold`: a process of its own, also where a child of the server could run the command."""
    words = [str(word) for word in command]
    if cold or not _can_run(words, options):
        return subprocess.Popen(words, **options)
    return WarmProcess(words, **options)


def _can_run(words: list[str], options: Mapping[str, Any]) -> bool:
    environment = options.get("env") or os.environ
    known = {"stdin", "stdout", "stderr", "env", "cwd", "start_new_session", "text", "bufsize"}
    if words[0] != sys.executable or len(words) < 2 or not options.keys() <= known:
        return False
    if words[1] not in ("-c", "-m") and not Path(options.get("cwd") or ".", words[1]).is_file():
        return False  # also other options of Python
    return _QUIET | read_once(environment) == read_once(_ENVIRONMENT)


@cache
def _server() -> socket.socket:
    """The connection to this process's server. It ends with the connection, and so do its children."""
    ours, theirs = socket.socketpair()
    environment = {name: value for name, value in _ENVIRONMENT.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, _SERVER, str(theirs.fileno())], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env=environment, pass_fds=[theirs.fileno()],
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)  # closing it is not enough where a forked worker of a test has it too
        process.wait(10)

    atexit.register(end)
    return ours


class WarmProcess(subprocess.Popen[Any]):
    """A child of the server instead of this process: the server tells how it ended. Numbers arrive as 8 bytes."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *options: Any) -> None:
        _, _, cwd, env, _, _, _, stdin, stdin_end, stdout_end, stdout, stderr_end, stderr, *more = options
        self._told, theirs = socket.socketpair()
        files = [own if given == -1 else given for own, given in enumerate((stdin, stdout, stderr))]
        with _LOCK, theirs:
            socket.send_fds(_server(), [b"1"], [*files, theirs.fileno()])
        job = {"words": args[1:], "cwd": os.path.abspath(cwd or "."), "session": bool(more[5])}
        job["environment"] = dict(os.environ if env is None else env)
        self._told.sendall(json.dumps(job).encode())
        self._told.shutdown(socket.SHUT_WR)
        self.pid = int(self._told.recv(8) or 0)
        if not self.pid:
            raise RuntimeError("the server of warm processes has ended; see what it wrote to standard error")
        self._child_created = True
        self._close_pipe_fds(stdin, stdin_end, stdout_end, stdout, stderr_end, stderr)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """As os.waitpid."""
        try:
            status = self._told.recv(8, socket.MSG_DONTWAIT if wait_flags & os.WNOHANG else 0)
        except BlockingIOError:
            return 0, 0
        self._told.close()
        return self.pid, int(status or signal.SIGKILL)  # the server kills its children when it ends

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0)
        return self.returncode
