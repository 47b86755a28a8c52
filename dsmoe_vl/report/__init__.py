"""The HTML report of an evaluation. `content.py` defines its data, `page.py` renders it."""

from __future__ import annotations

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
