"""The scores of an evaluation as tables, with labels and meaningful digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_vl.report.content import Report, ScoreLabel


@dataclass(frozen=True)
class ScoreRow:
    """One score: its name in eval.json, its label, and its values in the order of the table's folders."""

    name: str
    label: str
    values: list[str]


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one task. `folders`: short names by folder, for folders with scores."""

    title: str
    folders: dict[str, str]
    rows: list[ScoreRow]


def score_tables(report: Report, names: Mapping[str, str]) -> list[ScoreTable]:
    """One table per task with scores. `names`: short names by folder."""
    tables = []
    for task in dict.fromkeys(task for found in report.scores.values() for task in found):
        by_folder = {folder: found[task] for folder, found in report.scores.items() if found.get(task)}
        part = report.tasks.get(task)
        rows = []
        for name in dict.fromkeys(name for scores in by_folder.values() for name in scores):
            label = part.labels.get(name) if part else None
            label = label or _own_name(name)
            values = [digits(scores.get(name), label.unit) for scores in by_folder.values()]
            rows.append(ScoreRow(name, label.text, values))
        if rows:
            folders = {folder: names[folder] for folder in by_folder}
            tables.append(ScoreTable(part.title if part else task, folders, rows))
    return tables


def digits(value: object, unit: str = "plain") -> str:
    """A score as text, with meaningful digits; `unit` as in `ScoreLabel`. A dash if it was not measured."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    if value != value:
        return "not a number"
    if unit == "percent":
        return f"{100 * value:.1f}"
    if unit == "count" and float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _own_name(name: str) -> ScoreLabel:
    """The label of a score without one in its task."""
    return ScoreLabel(name.replace("_", " "), "count" if name.endswith(("samples", "count")) else "plain")
