"""The kernels as a library: compiled once for a machine, by its C compiler, and called through ctypes.

Plain C takes a second to compile, and PyTorch's headers a minute. The file's name is a hash of all that it depends
on, so that several processes, machines and versions can share a folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from dsmoe_vl.console import tell
from dsmoe_vl.files import replacing

# Not -ffast-math: linked with it, a library rounds small numbers to zero in the whole process; and it forgets NaN.
_OPTIONS = (
    "-O3", "-march=native", "-std=c11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
)  # fmt: skip
_SECONDS = 120.0  # at most, to compile
_POINTER, _COUNT, _NUMBER, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
_ARGUMENTS = {
    "swiglu": (*[_POINTER] * 2, _COUNT, _POINTER, *[_COUNT] * 2),
    "swiglu_gradients": (*[_POINTER] * 3, _COUNT, *[_POINTER] * 2, *[_COUNT] * 3),
    "scaled_swiglu_gradients": (*[_POINTER] * 7, *[_COUNT] * 2),
    "rms_norm": (*[_POINTER] * 4, *[_COUNT] * 2, _NUMBER),
    "rms_norm_gradients": (*[_POINTER] * 7, *[_COUNT] * 2),
    "heads": (*[_POINTER] * 6, *[_COUNT] * 4, _NUMBER),
    "heads_gradients": (*[_POINTER] * 9, *[_COUNT] * 4),
}
_FAILING = {  # they return 0, or 1 without memory
    "attention": (*[_POINTER] * 4, *[_COUNT] * 4, _FLAG),
    "attention_gradients": (*[_POINTER] * 5, *[_COUNT] * 4, _FLAG),
}


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None without a C compiler, or if it fails, which is said once."""
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = told[0] if told else type(error).__name__
        what = "the kernels for CPUs could not be compiled, so PyTorch's own operators run, which are slower"
        tell(f"warning: {what}: {reason}", sys.stderr)
        return None
    for name, arguments in (_ARGUMENTS | _FAILING).items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, ctypes.c_int32 if name in _FAILING else None
    return found


def build_folder() -> Path:
    """Where what is compiled at run time is kept: TORCH_EXTENSIONS_DIR; if unset, in the virtual environment, because
    it is built against its headers; else PyTorch's folder."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix, "torch_extensions")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Path.home() may fail
    return Path(cache, "torch_extensions")


def _compiled() -> Path:
    command = _compiler()
    depends = [*(path.read_text(encoding="utf-8") for path in _sources("*.[ch]")), *command, *_OPTIONS, _processor()]
    name = f"dsmoe_vl_{hashlib.sha256(chr(0).join(depends).encode()).hexdigest()[:16]}.so"
    kept = build_folder() / name
    if kept.exists():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            _compile(command, temporary)
    except OSError:  # a folder that cannot be written to
        kept = Path(tempfile.mkdtemp(prefix="dsmoe_vl_")) / name
        _compile(command, kept)
    return kept


def _compile(command: list[str], output: Path) -> None:
    subprocess.run(
        [*command, *_OPTIONS, *map(str, _sources("*.c")), "-o", str(output), "-lm"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=_SECONDS,
    )  # fmt: skip


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(pattern))


def _compiler() -> list[str]:
    wanted = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else [["cc"], ["gcc"], ["clang"]]
    for command in wanted:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise FileNotFoundError(f"no C compiler ({', '.join(command[0] for command in wanted)})")


def _processor() -> str:
    """What "native" means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kinds)))
