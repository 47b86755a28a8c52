"""Judges the facts of one host: each check is a function of facts alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsmoe_vl.doctor.cluster.findings import Finding, unchecked
from dsmoe_vl.doctor.cluster.host_facts import HostFacts, Interface
from dsmoe_vl.planner.plan import RunPlan

GIB = 2**30
# DeepSpeed's communication on a CPU has a buffer of this size for each rank; NCCL's are of the same order.
_SHM_OF_RANK = 66 * 2**20
_FILES_OF_RANK = 512  # libraries, shards, loader processes
_FILES_OF_PEER = 4  # connections to each other rank, over all groups
_IN_USE = 0.1  # share of a GPU's memory: more than its driver takes
_SAVED_BYTES = 4, 8  # of a checkpoint: by weight, and by weight that trains
# A step gets this share of the rate of large matrix products at best, and a tenth of that is slow training already.
_BEST_SHARE, _WORST_SHARE = 0.5, 0.05


@dataclass(frozen=True)
class Setting:
    """What the run asks of a host. `plan`: None if there is none for this number of ranks."""

    plan: RunPlan | None
    ranks: int  # of the host
    hosts: int
    is_first: bool  # its MASTER_PORT is the run's

    @property
    def shown(self) -> str:
        """How many ranks, in words."""
        return f"{self.ranks} rank{'s' * (self.ranks != 1)}"


def judge_host(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    """Every check of one host."""
    for check in (
        _accelerators, _memory, _shm, _run_folder, _open_files, _interfaces, _own_address, _port, _copy, _supply,
    ):  # fmt: skip
        yield from check(facts, setting)


def _accelerators(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    host, name, found = facts.host, "accelerators", facts.accelerators
    if found is None:
        yield unchecked(host, name, facts.unknown["accelerators"])
        return
    if facts.device == "cpu":
        if driver := (facts.versions or {}).get("driver"):
            text = f"driver {driver} is loaded, but ranks compute on the CPU"
            fix = "install torch for CUDA, make GPUs visible (CUDA_VISIBLE_DEVICES), or unset DS_ACCELERATOR"
            yield Finding("warning", host, name, text, fix)
        text = f"none; {setting.shown} on {facts.cores} CPU cores"
        if setting.ranks > facts.cores:
            yield Finding("warning", host, name, f"{text}, fewer than ranks", "start at most one rank on a core")
        else:
            yield Finding("ok", host, name, text)
        return
    kinds = ", ".join(dict.fromkeys(one.name for one in found))
    if setting.ranks > len(found):
        text = f"{setting.shown}, but {len(found)} GPUs: {kinds}"
        yield Finding("problem", host, name, text, f"set its slots, or ranks on each host, to {len(found)}")
        return
    yield Finding("ok", host, name, f"{len(found)} x {kinds}; {setting.shown}")
    need = setting.plan.memory.device if setting.plan else 0.0
    for index, one in enumerate(found):
        if one.free < need:
            text = f"GPU {index} has {_gib(one.free)} free of {_gib(one.memory)}; weights and states need {_gib(need)}"
            fix = "end what else uses it (nvidia-smi), use more ranks, a higher ZeRO stage, or offload"
            yield Finding("problem", host, name, text, fix)
        elif one.free < (1 - _IN_USE) * one.memory:
            text = f"GPU {index} has {_gib(one.free)} free of {_gib(one.memory)}: something else uses it"
            yield Finding("warning", host, name, text, "end it: nvidia-smi names its processes")


def _memory(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if facts.memory is None:
        yield unchecked(facts.host, "memory", facts.unknown["memory"])
        return
    free, total = facts.memory
    text = f"{_gib(free)} free of {_gib(total)}"
    if setting.plan is None:
        yield Finding("ok", facts.host, "memory", text)
        return
    of_rank = setting.plan.memory.host + (setting.plan.memory.device if setting.plan.device == "cpu" else 0)
    need = of_rank * setting.ranks
    text += f"; weights and states of {setting.shown}: {_gib(need)}"
    fix = "end other programs, use more hosts, a higher ZeRO stage, or a smaller model"
    if free < need:
        yield Finding("problem", facts.host, "memory", text, fix)
    elif free < 1.5 * need:
        yield Finding("warning", facts.host, "memory", f"{text}, and activations as well", fix)
    else:
        yield Finding("ok", facts.host, "memory", text)


def _shm(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if facts.shm is None:
        yield unchecked(facts.host, "/dev/shm", facts.unknown["shm"])
        return
    need = _SHM_OF_RANK * setting.ranks
    text = f"{_gib(facts.shm.free)} free of {_gib(facts.shm.total)}; needed by {setting.shown}: {need / 2**20:.0f} MiB"
    fix = "start the container with --shm-size=2g, mount a larger tmpfs there, or remove what killed runs have left"
    if facts.shm.free < need:
        yield Finding("problem", facts.host, "/dev/shm", text, fix)
    elif facts.shm.free < 2 * need:
        yield Finding("warning", facts.host, "/dev/shm", text, fix)
    else:
        yield Finding("ok", facts.host, "/dev/shm", text)


def _run_folder(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    name, space = "run folder", facts.run_folder
    if space is None:
        yield unchecked(facts.host, name, facts.unknown["run_folder"])
        return
    if not space.writable:
        text = f"{space.path}: {space.at} cannot be written"
        yield Finding("problem", facts.host, name, text, "change its permissions, or set run.directory")
        return
    text = f"{space.path}: {_gib(space.free)} free of {_gib(space.total)}"
    if setting.plan is None:
        yield Finding("ok", facts.host, name, text)
        return
    by_weight, by_trained = _SAVED_BYTES
    one = by_weight * setting.plan.parameters.total + by_trained * setting.plan.trained.total
    kept = setting.plan.recipe.run.keep_checkpoints + 1  # the next is written before the oldest is removed
    text += f"; a checkpoint takes about {_gib(one)}, and {kept} are there at once"
    if space.free < one:
        yield Finding("problem", facts.host, name, text, "free some space there, or set run.directory")
    elif space.free < kept * one:
        yield Finding("warning", facts.host, name, text, "free some space there, or lower run.keep_checkpoints")
    else:
        yield Finding("ok", facts.host, name, text)


def _open_files(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if facts.open_files is None:
        yield unchecked(facts.host, "open files", facts.unknown.get("open_files", "not asked"))
        return
    soft, hard = facts.open_files
    need = _FILES_OF_RANK + _FILES_OF_PEER * (setting.plan.world_size if setting.plan else setting.ranks)
    text = f"limit {'none' if soft < 0 else soft}; a rank needs about {need}"
    if 0 <= soft < need:
        possible = "" if hard < 0 or hard >= need else f"; the system's own limit is {hard}: raise it in limits.conf"
        yield Finding("problem", facts.host, "open files", text, f"ulimit -n {2 * need} where ranks start{possible}")
    else:
        yield Finding("ok", facts.host, "open files", text)


def _interfaces(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if facts.interfaces is None:
        yield unchecked(facts.host, "interfaces", facts.unknown["interfaces"])
        return
    used = [one for one in facts.interfaces if one.up and one.addresses]
    shown = ", ".join(f"{one.name} {one.addresses[0]} {_speed(one)}" for one in used)
    yield Finding("ok" if used else "warning", facts.host, "interfaces", shown or "none is up")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for asked in asked_interfaces(facts.environment.get(variable, "")):
            found = [one for one in facts.interfaces if matches(one.name, asked, variable)]
            if not any(one.up and one.addresses for one in found):
                what = "is down or has no address" if found else "does not exist"
                names = ", ".join(one.name for one in used)
                text = f"{variable}={facts.environment[variable]}: {asked} {what} here"
                yield Finding("problem", facts.host, "interfaces", text, f"set it to one of: {names}; or unset it")


def asked_interfaces(value: str) -> list[str]:
    """The interfaces that a variable asks for. NCCL's may begin with ^, before those not to use."""
    return [] if value.startswith("^") else [name.strip() for name in value.split(",") if name.strip()]


def matches(name: str, asked: str, variable: str) -> bool:
    """NCCL takes the beginning of a name, or all of it after a =; gloo takes all of it."""
    if variable == "NCCL_SOCKET_IFNAME" and not asked.startswith("="):
        return name.startswith(asked)
    return name == asked.removeprefix("=")


def _own_address(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    """Gloo gives others the address that the host's own name has, which on Debian may be of the loopback."""
    if setting.hosts == 1 or "GLOO_SOCKET_IFNAME" in facts.environment or facts.interfaces is None:
        return
    names = [one.name for one in facts.interfaces if one.up and one.addresses and not is_loopback(one)]
    fix = f"set GLOO_SOCKET_IFNAME={names[0] if names else 'INTERFACE'} on it, or correct its /etc/hosts"
    if facts.own_address is None:
        text = f"the host's own name has no address: {facts.unknown.get('own_address', 'not asked')}"
        yield Finding("problem", facts.host, "own address", text, fix)
    elif facts.own_address.startswith("127."):
        text = f"the host's own name means {facts.own_address} here, where other hosts cannot reach it"
        yield Finding("problem", facts.host, "own address", text, fix)
    else:
        yield Finding("ok", facts.host, "own address", facts.own_address)


def _port(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if not setting.is_first or facts.port_in_use is None:
        return
    port = facts.environment.get("MASTER_PORT", "29500")
    if facts.port_in_use:
        fix = "stop the other run, or choose another: deepspeed --master_port N, MASTER_PORT under other launchers"
        yield Finding("problem", facts.host, "port", f"MASTER_PORT {port} is in use", fix)
    else:
        yield Finding("ok", facts.host, "port", f"MASTER_PORT {port} is free")


def _copy(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    if facts.copy is None:
        yield unchecked(facts.host, "data", facts.unknown["copy"])
        return
    for problem in facts.copy.problems:
        yield Finding("problem", facts.host, "data", problem)
    if not facts.copy.problems:
        yield Finding("ok", facts.host, "data", f"tokenizer and {len(facts.copy.hashes) - 1} manifests can be read")


def _supply(facts: HostFacts, setting: Setting) -> Iterator[Finding]:
    """Tokens per second that one reader brings, against those that the ranks of the host can compute at best."""
    name, sources, plan = "storage", facts.sources, setting.plan
    if not sources or plan is None or facts.matrix_rate is None:
        why = facts.unknown.get("sources") or facts.unknown.get("matrix_rate") or "there is no plan for these ranks"
        yield unchecked(facts.host, name, why)
        return
    weights = sum(one.weight for one in sources)
    size = sum(one.weight * one.sample_bytes for one in sources) / weights
    seconds = sum(one.weight * one.sample_bytes / max(one.bytes_per_second, 1.0) for one in sources) / weights
    rate = f"one reader reads {_megabytes(size / seconds)}"
    if not all(one.sample_tokens for one in sources):
        unknown = ", ".join(one.name for one in sources if not one.sample_tokens)
        yield unchecked(facts.host, name, f"{rate}; what a sample of {unknown} is for training is not known")
        return
    tokens = sum(one.weight * one.sample_tokens for one in sources) / weights
    peak = setting.ranks * facts.matrix_rate / (3 * plan.flops_per_token)  # tokens per second
    need = _BEST_SHARE * peak * size / tokens
    text = f"{rate}; {setting.shown} can use {_megabytes(need)}, at {_BEST_SHARE:.0%} of the rate of matrix products"
    fix = "raise data.workers, copy the shards to a faster disk, or give sources larger samples"
    if size / seconds < need * _WORST_SHARE / _BEST_SHARE:
        yield Finding("problem", facts.host, name, text, fix)
    elif size / seconds < need:
        yield Finding("warning", facts.host, name, text, fix)
    else:
        yield Finding("ok", facts.host, name, text)


def is_loopback(one: Interface) -> bool:
    """Whether it reaches this host only."""
    return any(address.startswith("127.") or address == "::1" for address in one.addresses)


def _speed(one: Interface) -> str:
    return f"{one.megabits / 1000:g} Gbit/s" if one.megabits else "(speed unknown)"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"


def _megabytes(rate: float) -> str:
    return f"{rate / 1e6:,.1f} MB/s" if rate >= 1e6 else f"{rate / 1e3:.1f} kB/s"
