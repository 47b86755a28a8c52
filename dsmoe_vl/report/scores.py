"""The scores of an evaluation as tables: what each number says, its unit, and as many digits as mean something."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dsmoe_vl.report.text import said, short_name

TASKS = {"caption": "Captions", "retrieval": "Retrieval", "summary": "Video summaries"}

_COUNT, _PERCENT, _PLAIN = "count", "percent", "plain"
# What to call a score, and how to write it. `_directed` and `_label` know the others.
_METRICS = {
    "caption samples": ("samples captioned", _COUNT),
    "retrieval samples": ("pictures or videos searched", _COUNT),
    "summary samples": ("videos summarized", _COUNT),
    "with_truth": ("captions whose truth is known", _COUNT),
    "correct": ("of these, name every object's colour and shape", _COUNT),
    "attribute_accuracy": ("name every object's colour and shape, %", _PERCENT),
    "key_frame_f": ("key frames in common with the annotation (F, 0 to 1)", _PLAIN),
    "kendall_tau": ("rank correlation with the annotation (Kendall's τ, -1 to 1)", _PLAIN),
    "spearman_rho": ("rank correlation with the annotation (Spearman's ρ, -1 to 1)", _PLAIN),
    "importance_error": ("mean absolute error of importance (0 to 1)", _PLAIN),
    "user_kendall_tau": ("mean rank correlation with each annotator (Kendall's τ, -1 to 1)", _PLAIN),
    "user_spearman_rho": ("mean rank correlation with each annotator (Spearman's ρ, -1 to 1)", _PLAIN),
    "tvsum_f": ("key shots as TVSum counts them (F, 0 to 1)", _PLAIN),
    "summe_f": ("key shots as SumMe counts them (F, 0 to 1)", _PLAIN),
    "videoxum_f": ("frames as VideoXum counts them (F, 0 to 1)", _PLAIN),
    "cider_d": ("CIDEr", _PLAIN),
    "rouge_l": ("ROUGE-L (0 to 1)", _PLAIN),
    "meteor": ("METEOR (0 to 1)", _PLAIN),
    "spice": ("SPICE (0 to 1)", _PLAIN),
}
_IN_LINE = {
    "key_frame_f": "key frames in common: F",
    "kendall_tau": "Kendall's τ",
    "spearman_rho": "Spearman's ρ",
    "importance_error": "mean absolute error",
}
_DIRECTIONS = {"media_to_text": "picture to text", "text_to_media": "text to picture"}
_DIRECTED = re.compile(r"(?:coco_(\w+?)_)?(media_to_text|text_to_media)_(?:r(\d+)|(median_rank))")
_BLEU = re.compile(r"bleu_?(\d)")


def metric_tables(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table for each task, a column for each folder that has scores of it. HTML."""
    tables = []
    for task in dict.fromkeys(task for found in scores.values() for task in found):
        folders = [folder for folder in scores if scores[folder].get(task)]
        names = dict.fromkeys(name for folder in folders for name in scores[folder][task])
        if not names:
            continue
        head = "".join(
            f'<th scope="col" class="number" title="{said(folder)}">{_breakable(short_name(folder, scores))}</th>'
            for folder in folders
        )
        rows = "".join(_row(task, name, [scores[folder][task].get(name) for folder in folders]) for name in names)
        tables.append(
            f"<h3>{said(TASKS.get(task, task))}</h3>"
            f'<div class="wide"><table><thead><tr><th scope="col">What was measured</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(tables)


def score_line(scores: Mapping[str, float]) -> str:
    """How well the importance of one video was predicted, in a line. HTML."""
    return " · ".join(f"{name} {_written(scores[key], _PLAIN)}" for key, name in _IN_LINE.items() if key in scores)


def _row(task: str, name: str, values: list[float | None]) -> str:
    label, unit = _label(task, name)
    cells = "".join(f'<td class="number">{_written(value, unit)}</td>' for value in values)
    return f'<tr><th scope="row" title="{said(name)}">{said(label)}</th>{cells}</tr>'


def _label(task: str, name: str) -> tuple[str, str]:
    """What a score is called, and how it is written; a name that is not known here stands for itself."""
    known = _METRICS.get(f"{task} {name}") or _METRICS.get(name)
    if known:
        return known
    if match := _DIRECTED.fullmatch(name):
        test, direction, recall, _ = match.groups()
        label = f"{_DIRECTIONS[direction]}: " + (
            f"right one among the first {recall} (R@{recall}), %" if recall else "median place of the right one"
        )
        label = label.replace("among the first 1 ", "found first ")
        return (f"COCO {test} test, {label}" if test else label), _PERCENT if recall else _COUNT
    if match := _BLEU.fullmatch(name):
        return f"BLEU-{match[1]} (0 to 1)", _PLAIN
    return name.replace("_", " "), _COUNT if name.endswith(("samples", "count")) else _PLAIN


def _breakable(name: str) -> str:
    """A name as HTML that a narrow column may break behind its parts."""
    return re.sub("(&[^;]*;)|([_/.-])", lambda match: match[1] or f"{match[2]}<wbr>", said(name))


def _written(value: object, unit: str) -> str:
    """Digits that mean something; a thin dash for what was not measured."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return said(str(value))
    if value != value:
        return "not a number"
    if unit == _PERCENT:
        return f"{100 * value:.1f}"
    if unit == _COUNT and value == int(value):
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
