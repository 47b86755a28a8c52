"""A report in a real browser, on a wide screen and on a phone's: what is drawn, loaded and complained about.

Headless Chromium without a driver: the report lies in a frame of a page of ours, which measures it and writes what it
has found into its own text, and Chromium prints that.
"""

from __future__ import annotations

import html as markup
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from dsmoe_vl.report.page import render
from tests.support.reports import made_up

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120

pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no chromium on PATH: not checked that a report is drawn, quiet in the console and loads nothing",
)

_MEASURE = """
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument, view = frame.contentWindow;
  const pictures = [...page.images];
  const opaque = picture => {  // drawing decodes it now; a promise would not be waited for
    const canvas = document.createElement("canvas").getContext("2d");
    try { canvas.drawImage(picture, 0, 0, 1, 1); } catch { return false; }
    return canvas.getImageData(0, 0, 1, 1).data[3] === 255;
  };
  const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const boxes = query => [...page.querySelectorAll(query)].map(box);
  const width = page.documentElement.clientWidth;
  const found = {
    title: page.title,
    sections: Object.fromEntries([...page.querySelectorAll("section")].map(s => [s.id, box(s)])),
    pictures: pictures.map(box), decoded: pictures.filter(opaque).length,
    charts: boxes(".chart svg"), lines: boxes(".chart path.line"), maps: boxes("svg.map"), cells: boxes(".map .cell"),
    loaded: view.performance.getEntriesByType("resource").map(e => e.name),
    too_wide: page.documentElement.scrollWidth - width,
    page: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
    alerts: view.alerts || 0, scripts: page.scripts.length,
  };
  document.querySelector("pre").textContent = JSON.stringify(found);
});
"""


@dataclass(frozen=True)
class Seen:
    """What the browser has measured, and its lines about the console."""

    found: dict[str, Any]
    console: list[str]


def look(report: str, folder, width: int, dark: bool = False) -> Seen:
    """Show a page in a frame so wide, in pixels."""
    frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{markup.escape(report)}"></iframe>'
    page = folder / "page.html"
    page.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><pre></pre>{frame}<script>{_MEASURE}</script>', encoding="utf-8"
    )
    assert BROWSER is not None
    command = [
        BROWSER, "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
        "--disable-background-networking", "--no-first-run", f"--window-size={max(width, 600)},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr",
        "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium refuses to be root with one
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    written = re.search(r"<pre>(\{.*?\})</pre>", result.stdout, re.DOTALL)
    assert written, result.stdout[-500:] + result.stderr[-2000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(markup.unescape(written[1])), console)


@pytest.fixture(scope="module")
def report():
    return render(made_up())


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)], ids=["desktop", "dark phone"])
def test_report_is_drawn_and_quiet(report, tmp_path, width, dark):
    seen = look(report, tmp_path, width, dark)
    found = seen.found
    assert found["title"].startswith("Evaluation of run ")
    assert list(found["sections"]) == ["metrics", "captions", "retrieval", "summaries", "routing", "plan"]
    assert all(min(box) > 50 for box in found["sections"].values())
    assert len(found["pictures"]) == found["decoded"] > 20
    assert all(min(box) > 20 for box in found["pictures"])
    assert len(found["charts"]) == 1 and found["charts"][0][0] > 0.6 * width
    assert all(box[0] > 100 and box[1] > 20 for box in found["lines"])
    assert len(found["maps"]) == 7 and all(min(box) > 50 for box in found["maps"])
    assert len(found["cells"]) == 7 * 3 * 8 and all(min(box) > 5 for box in found["cells"])
    assert found["too_wide"] <= 0
    assert found["alerts"] == found["scripts"] == 0
    assert found["loaded"] == [] and seen.console == []
    lightness = [sum(map(int, re.findall(r"\d+", found[name])[:3])) / 765 for name in ("page", "ink")]
    assert lightness[0] < 0.2 < 0.8 < lightness[1] if dark else lightness[1] < 0.2 < 0.8 < lightness[0]


def test_nothing_is_loaded_even_where_the_browser_would(report, tmp_path):
    """The page's own policy forbids loading; without it there is nothing to forbid."""
    bare, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report)
    assert count == 1
    seen = look(bare, tmp_path, 1200)
    assert seen.found["loaded"] == [] and seen.console == [] and seen.found["alerts"] == 0


def test_faults_are_noticed(tmp_path):
    """These checks on pages that fail them."""
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    fault = '<body style="background:#fff"><img src="http://127.0.0.1:9/a.png"><p style="width:5000px">wide'
    seen = look(fault, tmp_path, 390)
    assert seen.found["loaded"] == ["http://127.0.0.1:9/a.png"]
    assert seen.found["decoded"] == 0 and seen.found["too_wide"] > 4000
    assert look(policy + fault, tmp_path, 390).console
