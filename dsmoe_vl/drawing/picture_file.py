"""Pictures on disk: a file is the old picture or the new one, never a part of it."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_atomically

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def format_of(path: Path, option: str) -> str:
    """Pillow's name of the format in which a picture is saved as `path`. Raises ConfigError, naming the `option`."""
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise ConfigError(f"{option} {path}: the name must end in {', '.join(SUFFIXES)}")
    return form


def save_picture(picture: Image.Image, path: Path, form: str = "PNG", **options: int) -> None:
    """Create or replace the file `path` as a whole; `options` are Pillow's. Raises OSError, and the old file stays."""
    encoded = io.BytesIO()
    picture.save(encoded, form, **options)
    write_atomically(path, encoded.getvalue())
