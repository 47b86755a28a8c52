"""Writes a video's summary to files: text, key frames, storyboard and importance curve."""

from __future__ import annotations

import math
import re
from pathlib import Path

from PIL import Image

from dsmoe_vl.data.decode import sampled_frames
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.drawing.pages import Tile, curve, page
from dsmoe_vl.drawing.picture_file import save_picture
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_atomically
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.summarize import VideoSummary

_JPEG_QUALITY = 95
_KEY_FRAME = re.compile(r"key_\d+_at_\d+\.\d\ds\.jpg")


def write_summary(
    trained: TrainedModel, sample: Sample, summary: VideoSummary, folder: Path, count: int | None = None
) -> list[Path]:
    """Write the files to `folder`, replacing an earlier summary. Returns the files of the key frames.

    `count`: see `VideoSummary.key_frames`. Raises ConfigError if a file cannot be written.
    """
    pictures = [Image.fromarray(pixels) for _, pixels in sampled_frames(sample, trained.recipe.data)]
    keys = summary.key_frames(count)
    tiles = [
        Tile(
            picture,
            (f"{second:.2f} s" + (", key frame" if number in keys else ""), f"importance {importance:.2f}"),
            number in keys,
        )
        for number, (picture, second, importance) in enumerate(
            zip(pictures, summary.seconds, summary.importance, strict=True)
        )
    ]
    name = Path(sample.key).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if _KEY_FRAME.fullmatch(old.name):
                old.unlink()
        write_atomically(folder / "summary.txt", summary.text + "\n")
        written = []
        for rank, number in enumerate(keys, 1):
            written.append(folder / f"key_{rank:02}_at_{summary.seconds[number]:.2f}s.jpg")
            save_picture(pictures[number], written[-1], "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        columns = min(math.ceil(len(tiles) ** 0.5), 8)
        save_picture(page(tiles, f"{name}: {summary.text}", columns=columns), folder / "storyboard.png")
        title = f"Importance of the frames of {name}"
        save_picture(curve(summary.seconds, summary.importance, keys, title), folder / "importance.png")
    except OSError as error:
        place = error.filename or folder
        raise ConfigError(f"{place} cannot be written: {error.strerror}; name another --output") from None
    return written
