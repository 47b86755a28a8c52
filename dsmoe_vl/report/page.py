"""The page that an evaluation leaves beside its scores: one file that needs nothing else, not even a network.

Titles say what one sees. All text from data, plans and paths goes through `report_text.said`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from dsmoe_vl.data.segment import Modality, TaskId
from dsmoe_vl.report.charts import data_uri, importance_chart, load_map
from dsmoe_vl.report.content import (
    Candidate,
    CaptionExample,
    ExpertLoad,
    FolderExamples,
    Report,
    RetrievalExample,
    Storyboard,
    Thumbnail,
)
from dsmoe_vl.report.scores import metric_tables, score_line
from dsmoe_vl.report.style import STYLE
from dsmoe_vl.report.text import flat, magnitude, passage, said, short_name

_REFERENCES = 3  # of a sample, shown
# The browser holds the page to its promise: whatever text should slip through, nothing is fetched and nothing runs.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_OF_TASKS = {TaskId.CAPTION: "captions", TaskId.RETRIEVAL: "retrieval", TaskId.SUMMARY: "video summaries"}
_OF_MODALITIES = {Modality.TEXT: "text", Modality.IMAGE: "images", Modality.VIDEO: "video frames"}


def render(report: Report) -> str:
    """The whole page. HTML."""
    sections = [
        ("metrics", "Scores by task and folder", metric_tables(report.scores)),
        ("captions", "Generated captions beside their references", _captions(report)),
        ("retrieval", "What queries find, by cosine similarity", _retrieval(report)),
        ("summaries", "Videos: importance over time and key frames", _summaries(report)),
        ("routing", "Experts: where tokens are sent", _routing(report.load)),
        ("plan", "The run", _plan(report)),
    ]
    filled = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in filled)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in filled)
    title = f"Evaluation of {said(report.run)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>\n'
        f'<body><header><h1>{title}</h1><p class="facts">{_facts(report)}</p><nav>{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _facts(report: Report) -> str:
    counts = report.plan.get("parameters", {})
    facts = [f"weights of step {report.step:,}"]
    if {"total", "active"} <= counts.keys():
        facts.append(f"{magnitude(counts['total'])} parameters, {magnitude(counts['active'])} active for a token")
    if report.scores:
        facts.append(", ".join(said(short_name(folder, report.scores)) for folder in report.scores))
    return " · ".join(facts)


def _folders(report: Report, show: Callable[[FolderExamples], str]) -> Iterable[tuple[str, str]]:
    """The folders that have something to show, their short names as HTML."""
    for folder, examples in report.examples.items():
        if content := show(examples):
            yield said(short_name(folder, report.examples)), content


def _captions(report: Report) -> str:
    parts = [f"<h3>{name}</h3>{content}" for name, content in _folders(report, _caption_groups)]
    judged = any(shown.correct is not None for examples in report.examples.values() for shown in examples.captions)
    note = '<p class="note">Right: it names the colour and shape of every object in the picture.</p>' if judged else ""
    return note + "".join(parts) if parts else ""


def _caption_groups(examples: FolderExamples) -> str:
    groups = {"Chosen at random": examples.captions, "Wrong ones, chosen at random": examples.wrong}
    return "".join(
        f'<h4>{title}</h4><div class="cards">{"".join(map(_card, cards))}</div>'
        for title, cards in groups.items()
        if cards
    )


def _card(example: CaptionExample) -> str:
    pictures = "".join(_picture(picture, f"from {example.key}") for picture in example.pictures)
    references = "".join(f'<dd dir="auto">{passage(text)}</dd>' for text in example.references[:_REFERENCES])
    more = len(example.references) - _REFERENCES
    if not references:
        references = '<dd class="note">(none)</dd>'
    if more > 0:
        references += f'<dd class="note">and {more} more</dd>'
    mark = "" if example.correct is None else _mark(example.correct, "right", "wrong")
    return (
        f'<article class="card"><div class="pictures">{pictures}</div>{mark}'
        f'<dl><dt>generated</dt><dd dir="auto">{passage(example.generated)}</dd>'
        f"<dt>reference</dt>{references or '<dd>(none)</dd>'}</dl>"
        f'<div class="key">{said(example.key)}</div></article>'
    )


def _retrieval(report: Report) -> str:
    parts = [f"<h3>{name}</h3>{content}" for name, content in _folders(report, _queries)]
    if not parts:
        return ""
    return (
        '<p class="note">The nearest candidates of all, the nearest first, with the cosine of the angle between them '
        "and the query (-1 to 1). What belongs to the query has a green frame or rule.</p>" + "".join(parts)
    )


def _queries(examples: FolderExamples) -> str:
    directions = {"text_to_media": "A text looks for its picture", "media_to_text": "A picture looks for its texts"}
    parts = []
    for direction, title in directions.items():
        queries = "".join(_query(example) for example in examples.retrieval if example.direction == direction)
        parts.append(f'<h4>{title}</h4><div class="queries">{queries}</div>' if queries else "")
    return "".join(parts)


def _query(example: RetrievalExample) -> str:
    kind = "media" if example.direction == "text_to_media" else "texts"
    found = "".join(_candidate(candidate, kind) for candidate in example.found)
    place = f"right one in place {example.place:,} of {example.gallery:,}"
    if not any(candidate.right for candidate in example.found):
        place += f", with {_cosine(example.right.score)}"
        if kind == "texts":
            place += f": “{passage(example.right.text)}”"
    asked = f'<p dir="auto">{passage(example.text)}</p>' if kind == "media" else _media(example.picture, "the query")
    return (
        f'<article class="query"><div class="asked">{asked}<div class="mark {_tone(example.place == 1)}">{place}</div>'
        f'</div><ol class="found {kind}">{found}</ol></article>'
    )


def _candidate(candidate: Candidate, kind: str) -> str:
    right = ' class="right"' if candidate.right else ""
    spoken = _mark(True, "right", "") if candidate.right else ""
    score = f'<span class="score">{_cosine(candidate.score)}</span>'
    if kind == "media":
        return f"<li{right}>{_media(candidate.picture, 'a candidate')}{score} {spoken}</li>"
    return f'<li{right}>{score}<span dir="auto">{passage(candidate.text)} {spoken}</span></li>'


def _summaries(report: Report) -> str:
    parts = [
        f"<h3>{name}</h3><h4>Chosen at random</h4>{content}"
        for name, content in _folders(report, lambda examples: "".join(map(_video, examples.storyboards)))
    ]
    return "".join(parts)


def _video(board: Storyboard) -> str:
    who = "one annotator" if board.annotators == 1 else f"mean of {board.annotators} annotators"
    frames = "".join(_frame(board, number) for number in sorted(board.frames))
    note = "Under each frame: its time, and its predicted importance."
    if len(board.frames) < len(board.seconds):
        note += f" Shown are {len(board.frames)} of the {len(board.seconds)} frames that the model sees."
    reference = f'<dt>reference</dt><dd dir="auto">{passage(board.reference)}</dd>' if board.reference else ""
    named = board.scores.get("attribute_accuracy")
    mark = "" if named is None else _mark(named == 1, "right", "wrong")
    return (
        f'<article class="video">{mark}<dl>'
        f'<dt>generated</dt><dd dir="auto">{passage(board.generated)}</dd>{reference}</dl>'
        f'{importance_chart(board)}<div class="legend"><span><i class="line"></i>importance predicted (0 to 1)</span>'
        f'<span><i class="truth"></i>annotated, {who}</span><span><i class="keys"></i>key frames chosen</span></div>'
        f'<div class="strip">{frames}</div><p class="note">{note}</p>'
        f'<p class="note">{score_line(board.scores)}</p><div class="key">{said(board.key)}</div></article>'
    )


def _frame(board: Storyboard, number: int) -> str:
    chosen = number in board.key_frames
    label = "<br><strong>key frame</strong>" if chosen else ""
    seconds, importance = float(board.seconds[number]), float(board.importance[number])
    return (
        f'<figure class="{"chosen" if chosen else "other"}">'
        f"{_picture(board.frames[number], f'frame at {seconds:.2f} seconds')}"
        f"<figcaption>{seconds:.2f} s<br>{importance:.2f}{label}</figcaption></figure>"
    )


def _routing(load: ExpertLoad | None) -> str:
    if load is None:
        return ""
    groups = {
        "All tokens": [("all tokens", load.load.sum((1, 2)))],
        "By task": [(_OF_TASKS[task], load.load[:, task].sum(1)) for task in TaskId],
        "By modality of the token": [(_OF_MODALITIES[kind], load.load[:, :, kind].sum(1)) for kind in Modality],
    }
    shown = {title: [(name, sums) for name, sums in maps if sums.any()] for title, maps in groups.items()}
    shares = [_shares(sums) for maps in shown.values() for _, sums in maps]
    top = max(float(share.max()) for share in shares)
    even = " or ".join(f"{100 / count:.3g} %" for count in sorted(set(load.experts), reverse=True))
    parts = [
        '<p class="note">Each row is a decoder layer with experts, counted from 0; its numbers are the percent of the '
        f"layer's assignments that each expert gets, over everything that was evaluated. Even would be {even}.</p>"
        f'<p class="note">0 %<span class="scale"></span>{100 * top:.0f} %</p>'
    ]
    for title, maps in shown.items():
        figures = "".join(
            f"<figure><figcaption>{name}: {magnitude(float(sums[0].sum()))} assignments a layer</figcaption>"
            f'<div class="wide">{load_map(_shares(sums), top, load.layers, load.experts, f"Percent by expert: {name}")}'
            "</div></figure>"
            for name, sums in maps
        )
        parts.append(f'<h3>{title}</h3><div class="maps">{figures}</div>')
    return "".join(parts)


def _shares(sums: np.ndarray) -> np.ndarray:
    """Of each layer's assignments, [N, E]; a layer that computed nothing has zeros."""
    return sums / np.maximum(sums.sum(1, keepdims=True), 1.0)


def _plan(report: Report) -> str:
    plan = report.plan
    counts, recipe = plan.get("parameters", {}), plan.get("recipe", {})
    steps = recipe.get("run", {}).get("steps")
    facts = {
        "optimizer steps": f"{report.step:,}" + (f" of {steps:,} planned" if isinstance(steps, int) else ""),
        "tokens a step": _count(plan.get("tokens_per_step")),
        "ranks": _count(plan.get("world_size")),
        "ranks that share the experts": _count(plan.get("ep_size")),
        "ZeRO stage": _count(plan.get("zero_stage")),
        "precision": said(str(plan.get("precision", ""))),
    }
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts.items() if value)
    parts = "".join(
        f'<tr><th scope="row">{said(name.replace("_", " "))}</th><td class="number">{number:,}</td></tr>'
        for name, number in counts.items()
        if isinstance(number, int) and number
    )
    folds = [("Parameters by part", f'<div class="wide"><table><tbody>{parts}</tbody></table></div>' if parts else "")]
    for key, title in (("recipe", "Recipe"), ("deepspeed", "DeepSpeed configuration")):
        lines = "\n".join(flat(plan[key])) if plan.get(key) else ""
        folds.append((title, f"<pre>{said(lines)}</pre>" if lines else ""))
    details = "".join(f"<details><summary>{title}</summary>{body}</details>" for title, body in folds if body)
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>{details}'


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _media(picture: Thumbnail | None, what: str) -> str:
    return _picture(picture, what) if picture else '<div class="no-picture">no picture</div>'


def _picture(picture: Thumbnail, what: str) -> str:
    return (
        f'<img src="{data_uri(picture.jpeg, "jpeg")}" width="{picture.width}" height="{picture.height}" '
        f'alt="{said(what)}">'
    )


def _mark(right: bool, yes: str, no: str) -> str:
    """Told by a sign and a word as well as by colour."""
    return f'<span class="mark {_tone(right)}">{"✓ " + yes if right else "✗ " + no}</span>'


def _tone(right: bool) -> str:
    return "is-right" if right else "is-wrong"


def _cosine(score: float) -> str:
    return f"{score:.3f}"
