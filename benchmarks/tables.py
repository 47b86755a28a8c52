"""Tables in Markdown whose rows say where their figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.record import Machine, Result

# Result files by benchmark; those of one benchmark in the order of their names.
Results = Mapping[str, Sequence[Result]]

# What measures a benchmark that has no result file yet.
COMMANDS = {
    **{
        part: f"python benchmarks/compare.py --parts {part}"
        for part in ("catalogue", "scenes", "task_weights", "alone")
    },
    "data": "python benchmarks/data.py",
    "generate": "python benchmarks/generate.py",
    "moe_cost": "deepspeed --num_accelerators 2 benchmarks/moe_cost.py",
    "moe_layer": "python benchmarks/moe_layer.py",
    "traffic": "python benchmarks/traffic.py",
    "packing": "python benchmarks/packing.py",
    "growth": "python benchmarks/growth.py",
    "import_model": "python benchmarks/import_model.py",
    "kills": "python benchmarks/kills.py",
    "large": "python benchmarks/large.py",
    "learning": "python benchmarks/learning.py --pictures DIR",
    "monitoring": "deepspeed --num_accelerators 2 benchmarks/monitoring.py",
    "parting": "python benchmarks/parting.py",
    "pretrained": "python benchmarks/pretrained.py",
    "pretrained_pictures": "python benchmarks/pretrained_pictures.py --pictures DIR",
    "planning": "python benchmarks/planning.py",
    "published": "python benchmarks/published.py",
    "quickstart": "python benchmarks/recipes.py quickstart",
    "rates": "python benchmarks/rates.py --pictures DIR",
    "scaling": "python benchmarks/scaling.py",
    "sizes": "python benchmarks/sizes.py",
    "three_tasks": "python benchmarks/recipes.py three_tasks",
    "speech": "python benchmarks/recipes.py speech",
    "train_peer": "deepspeed --num_accelerators 2 benchmarks/train_peer.py",
    "train_step": "deepspeed --num_accelerators 2 benchmarks/train_step.py",
    "ablations": "python benchmarks/ablations.py",
    "checkpoint": "deepspeed --num_accelerators 2 benchmarks/checkpoint.py",
}


class Table:
    """Rows of cells, each with the source of its figures."""

    def __init__(self, *head: str) -> None:
        self.head = head
        self.rows: list[tuple[tuple[str, ...], str]] = []

    def row(self, source: Result | str, *cells: str) -> None:
        """`source`: a result, or words in place of one."""
        assert len(cells) == len(self.head), (self.head, cells)
        self.rows.append((cells, cite(source) if isinstance(source, Result) else source))

    def unverified(self, benchmark: str, label: str) -> None:
        """A row for figures that nothing has measured yet."""
        cells = (label, "unverified", *[""] * (len(self.head) - 2))
        self.row(f"not measured yet: `{COMMANDS[benchmark]}`", *cells)

    def unverified_on_cuda(self, label: str, command: str) -> None:
        """A row for figures that no GPU has given yet; `command` would measure them."""
        self.row(f"not measured yet: `{command}`", label, "unverified on CUDA", *[""] * (len(self.head) - 2))


def block(*tables: Table) -> str:
    """Tables in Markdown with their sources: one line below them, or a numbered list and a column of numbers."""
    sources = list(dict.fromkeys(source for table in tables for _, source in table.rows))
    parts = []
    for table in tables:
        head, rows = list(table.head), [list(cells) for cells, _ in table.rows]
        if len(sources) > 1:
            head.append("source")
            rows = [[*cells, str(sources.index(source) + 1)] for cells, source in table.rows]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    if len(sources) == 1:
        return "\n\n".join([*parts, f"Source: {sources[0]}."])
    numbered = "\n".join(f"{number}. {source}" for number, source in enumerate(sources, 1))
    return "\n\n".join([*parts, "Sources:", numbered])


def cite(result: Result) -> str:
    """Command, commit, date and machine of a result."""
    commit = f"commit {result.commit}" if result.commit else "commit not recorded"
    date = result.date[:10] if result.date else "date not recorded"
    return f"`{result.command}`; {commit}; {date}; {_machine(result.machine)}"


def _machine(machine: Machine) -> str:
    if machine == Machine():
        return "machine not recorded"
    parts = [machine.cpu or "CPU model not recorded"]
    if machine.cores:
        parts.append(f"{machine.cores} cores" if machine.cores > 1 else "1 core")
    parts += machine.features or []
    if machine.accelerator is not None:
        parts.append("no GPU" if machine.accelerator == "none" else machine.accelerator)
    return ", ".join(parts)


def known(value: float | None, form: str) -> str:
    """A figure in a format of `str.format`, or that it was not recorded."""
    return "not recorded" if value is None else form.format(value)


def newest(results: Results, benchmark: str) -> Result | None:
    """The result with the latest date, if there is one."""
    return max(results.get(benchmark, ()), key=lambda result: result.date or "", default=None)
