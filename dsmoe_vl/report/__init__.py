"""The page that an evaluation leaves beside its scores. `content.py` says what it shows, `page.py` renders it."""

from __future__ import annotations

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
