"""Renders an evaluation's report to one HTML file that needs no other file and no network.

Its text is in `templates/`, where Jinja2 escapes all text from data, plans and paths. Numbers and charts are computed
in this package.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dsmoe_vl.report import TEMPLATES
from dsmoe_vl.report.charts import importance_chart
from dsmoe_vl.report.content import Report, Section
from dsmoe_vl.report.routing import routing
from dsmoe_vl.report.scores import digits, score_tables
from dsmoe_vl.report.text import flat, magnitude, short_names

# Not allowed in HTML or not visible: C0 and C1 control characters, lone surrogates and noncharacters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(report: Report) -> str:
    """The page as HTML. Raises jinja2.TemplateError if a task's template cannot be read or rendered."""
    names = short_names([*report.scores, *(folder for part in report.tasks.values() for folder in part.examples)])
    filled = []
    for section, variables in _sections(report, names):
        template = _environment(section.template.parent).get_template(section.template.name)
        if body := template.render(variables).strip():
            filled.append((section, Markup(body)))  # already escaped when rendered
    page = _environment(TEMPLATES).get_template("page.html").render(report=report, names=names, sections=filled)
    return _UNPRINTABLE.sub("�", page)


def _sections(report: Report, names: dict[str, str]) -> Iterator[tuple[Section, dict[str, Any]]]:
    """Sections in the page's order, each with the variables of its template. `names`: short names by folder."""
    yield (
        Section("metrics", "Scores by task and folder", TEMPLATES / "scores.html"),
        {"tables": score_tables(report, names)},
    )
    for part in report.tasks.values():
        folders = [(names[folder], examples) for folder, examples in part.examples.items() if examples]
        if part.section and folders:
            yield part.section, {"folders": folders}
    if load := routing(report):
        yield Section("routing", "Experts: where tokens are sent", TEMPLATES / "routing.html"), {"routing": load}
    yield Section("plan", "The run", TEMPLATES / "plan.html"), {"plan": report.plan, "step": report.step}


@functools.cache
def _environment(folder: Path) -> Environment:
    """Jinja2 environment for the templates of a folder, which may import and include the page's."""
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "digits": digits,
        "flat": flat,
        "importance_chart": importance_chart,
        "magnitude": magnitude,
    }
    return environment
