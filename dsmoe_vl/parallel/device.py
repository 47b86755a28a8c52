"""The device of this process: type, bf16 support, peak FLOP/s, memory and CPU threads.

Torch is imported where it is needed: a plan for a machine without a GPU needs none, and importing it takes longer than
everything else of a plan.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.ranks import Ranks

if TYPE_CHECKING:
    import torch

# AVX512_BF16 is not enough: its matrix products are twice as fast as in fp32, but a whole step is slower (quickstart,
# two ranks on two cores: 3,100 against 3,950 tokens/s in fp32), because of the casts, and nothing else is faster.
_BF16_FLAG = "amx_bf16"
# A GPU's driver has one of these: NVIDIA's, on a Jetson, under Windows' WSL, AMD's.
_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
# Words in the device name, most specific name first, and its dense FLOP/s.
_PEAK_FLOPS_BF16 = (
    (("B200",), 2250e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100",), 989e12),
    (("H200",), 989e12),
    (("A100",), 312e12),
    (("L40S",), 362e12),
    (("A10G",), 70e12),
)


def device_name() -> Literal["cpu", "cuda"]:
    """The device type for training: DS_ACCELERATOR, which DeepSpeed reads too; if unset, cuda if available, else cpu.

    Raises ConfigError if the variable is neither cpu nor an available cuda.
    """
    name = os.environ.setdefault("DS_ACCELERATOR", "cuda" if _has_gpu() else "cpu")
    if name == "cpu":
        return "cpu"
    if name == "cuda" and _has_gpu():
        return "cuda"
    raise ConfigError(f"DS_ACCELERATOR={name} in the environment: unset it, or set it to cpu; cuda needs a visible GPU")


def _has_gpu() -> bool:
    """Whether torch sees one; it is asked only where there is a driver."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


@cache
def has_triton() -> bool:
    """Whether Triton is installed, as with PyTorch for CUDA on Linux; if not, says so once. Asked on a GPU only."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed: rotations and the SwiGLU of experts run as plain operators, with more traffic",
            stacklevel=2,
        )
    return found


def has_bf16_unit(device: str) -> bool:
    """Whether a step in bf16 is faster than in fp32: on GPUs with bf16, and on CPUs with matrix units (AMX)."""
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return _BF16_FLAG in flags.split()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense FLOP/s of the device's matrix units, from its data sheet. None if unknown: on any CPU, and in fp32,
    which may or may not use TF32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in _PEAK_FLOPS_BF16 if all(word in name for word in words)), None)


def memory_gib(device: torch.device) -> dict[str, float]:
    """GiB used by this process: on CUDA now and at its peak since the last call, on a CPU resident memory."""
    if device.type != "cuda":
        with open("/proc/self/statm") as pages:
            return {"rss_gib": int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30}
    import torch

    values = {
        "allocated_gib": torch.cuda.memory_allocated(device) / 2**30,
        "allocated_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "reserved_peak_gib": torch.cuda.max_memory_reserved(device) / 2**30,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return values


def free_host_bytes() -> int:
    """Memory that new data can take on this host: of the machine, and of the control group that limits this process."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])]
    with suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        free.append(int((group / "memory.max").read_text()) - used + cached)
    return min(free)


def use_device(name: str, ranks: Ranks, environment: Mapping[str, str] = os.environ) -> torch.device:
    """Set this rank's device. On a CPU the cores are divided evenly among the ranks of a host, unless OMP_NUM_THREADS
    is set: two ranks with one thread per core each are two to four times slower than with half of the cores each."""
    import torch

    if name == "cuda":
        torch.cuda.set_device(ranks.local_rank)
        return torch.device("cuda", ranks.local_rank)
    if "OMP_NUM_THREADS" not in environment:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_size))
    return torch.device("cpu")
