"""Judges the facts of all hosts against each other, and the plan for all ranks: functions of facts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from dsmoe_vl.data.copies import differences
from dsmoe_vl.doctor.cluster.findings import ALL_HOSTS, Finding, Level, unchecked
from dsmoe_vl.doctor.cluster.host_facts import HostFacts
from dsmoe_vl.doctor.cluster.one_host import Setting, judge_host
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.planner.plan import RunPlan

# Ranks that differ in these fail, or compute something else; in others, such as the compiler, they may.
_SAME = ("python", "torch", "deepspeed", "dsmoe_vl", "cuda of torch", "nccl")
_SKEW_SEEN, _SKEW_WRONG = 1.0, 5.0  # seconds


def judge(facts: Sequence[HostFacts], ranks: Mapping[str, int], plan: RunPlan | None) -> Iterator[Finding]:
    """Every check of facts. `facts`: the first is of the host whose MASTER_PORT is the run's. `ranks`: of each host."""
    for check in (_versions, _places, _devices, _clocks, _same_data, _shared_run_folder):
        yield from check(facts)
    for one in facts:
        yield from judge_host(one, Setting(plan, ranks[one.host], len(facts), one is facts[0]))


def judge_plan(make: Callable[[], RunPlan], ranks: int) -> tuple[RunPlan | None, list[Finding]]:
    """The plan for all ranks, if there is one, and what is wrong with it. `make` may raise ConfigError."""
    try:
        plan = make()
    except ConfigError as error:
        return None, [Finding("problem", ALL_HOSTS, "recipe", str(error))]
    notes = [Finding("warning", ALL_HOSTS, "recipe", note, "see `launch/train.py --dry-run`") for note in plan.notes]
    text = (
        f"fits the DeepSpeed JSON and a world size of {ranks}: EP {plan.ep_size}, ZeRO-{plan.zero_stage}, "
        f"{plan.precision}, {plan.packs_per_step} packs a step"
    )
    return plan, [Finding("ok", ALL_HOSTS, "recipe", text), *notes]


def _versions(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    known = {one.host: one.versions for one in facts if one.versions is not None}
    for one in facts:
        if one.versions is None:
            yield unchecked(one.host, "versions", one.unknown.get("versions", "not asked"))
    for name in dict.fromkeys(name for versions in known.values() for name in versions):
        of_hosts = {host: versions.get(name, "none") for host, versions in known.items()}
        for host, value, usual, who in _odd(of_hosts):
            fix = "install the same there: bash launch/setup.sh"
            if name == "dsmoe_vl":
                fix = "bring the repository there to the same state"
            shown = name if name != "dsmoe_vl" else "the code of dsmoe_vl"
            level: Level = "problem" if name in _SAME else "warning"
            yield Finding(level, host, "versions", f"{shown} is {value}, but {usual} on {who}", fix)
    if known:
        first = next(iter(known.values()))
        shown = ", ".join(f"{name} {value}" for name, value in first.items())
        same = all(versions == first for versions in known.values())
        where = f"the same on {len(known)} hosts" if same else f"those of {next(iter(known))}"
        yield Finding("ok", ALL_HOSTS, "versions", shown if len(known) == 1 else f"{shown}: {where}")
        if "compiler" not in first and facts[0].device == "cpu":
            text = "there is no C++ compiler, with which DeepSpeed's CPU communication is built once"
            yield Finding("problem", facts[0].host, "versions", text, "install g++")


def _places(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Launchers start the same paths on every host."""
    for what, of_hosts in (
        ("the repository", {one.host: one.repository for one in facts}),
        ("python", {one.host: one.python for one in facts}),
    ):
        for host, value, usual, who in _odd(of_hosts):
            text = f"{what} is {value}, but {usual} on {who}"
            yield Finding(
                "problem", host, "paths", text, "launchers start the same path everywhere: move it, or link it"
            )


def _devices(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    kinds = {
        one.host: f"{one.device} {', '.join(sorted({gpu.name for gpu in one.accelerators}))}".strip()
        for one in facts
        if one.accelerators is not None
    }
    for host, value, usual, who in _odd(kinds):
        text = f"ranks compute on {value}, but on {usual} on {who}: the slowest decides the speed"
        level: Level = "problem" if value.partition(" ")[0] != usual.partition(" ")[0] else "warning"
        yield Finding(level, host, "accelerators", text, "use hosts of one kind, and set DS_ACCELERATOR on all or none")


def _clocks(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Against the middle of all clocks, so that one that is wrong does not make the others wrong."""
    if len(facts) < 2:
        return
    for one in facts:
        if not one.heard:
            yield unchecked(one.host, "clock", "it was not reported in time")
    facts = [one for one in facts if one.heard]
    if not facts:
        return
    offsets = {one.host: one.clock - one.heard for one in facts}
    middle = sorted(offsets.values())[(len(offsets) - 1) // 2]
    errors = {one.host: one.clock_error for one in facts}
    worst = max(abs(offset - middle) - errors[host] for host, offset in offsets.items())
    for host, offset in offsets.items():
        skew, sure = offset - middle, abs(offset - middle) - errors[host]
        if sure >= _SKEW_SEEN:
            text = f"its clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the others"
            level: Level = "problem" if sure >= _SKEW_WRONG else "warning"
            yield Finding(level, host, "clock", text, "start its time service: chronyd, ntpd or systemd-timesyncd")
    if worst < _SKEW_SEEN:
        yield Finding("ok", ALL_HOSTS, "clock", f"clocks differ by less than {_SKEW_SEEN + max(errors.values()):.1f} s")


def _same_data(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    copies = [one.copy for one in facts if one.copy is not None]
    found = differences(copies)
    for copy, text in found:
        yield Finding("problem", copy.who, "data", text)
    if len(copies) > 1 and not found:
        yield Finding("ok", ALL_HOSTS, "data", f"tokenizer and manifests are the same on {len(copies)} hosts")


def _shared_run_folder(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    known = {one.host: one.run_folder_id for one in facts if one.run_folder_id}
    for host, _, _, who in _odd(known):
        text = f"the run folder seems to be another one than on {who}: all hosts must see the same checkpoints"
        yield Finding("warning", host, "run folder", text, "set run.directory to a folder that all hosts share")


def _odd(of_hosts: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """The hosts whose value is not that of most: host, value, the usual one, and a host that has it."""
    if not of_hosts:
        return
    usual = Counter(of_hosts.values()).most_common(1)[0][0]
    who = next(host for host, value in of_hosts.items() if value == usual)
    for host, value in of_hosts.items():
        if value != usual:
            yield host, value, usual, who
