"""SumMe: 25 videos with the summaries of 15 to 18 users each, in one MATLAB file per video."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats import Record, video_path
from data_tools.formats.tables import existing_folder
from data_tools.formats.timeline import Problem, checked_scores
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular

NAME = "summe"
HELP = "SumMe (a folder GT of .mat files)"
DESCRIPTION = """\
Expected files:

    SumMe/
      GT/Saving dolphines.mat         user_score (frames x users; 0: not in the user's summary), nFrames, ...
      videos/Saving dolphines.mp4     or webm, mkv, avi

SumMe has no texts: the file name becomes the summary. `saliency` is one curve per user, with 0 or 1 for each part of at
most 15 frames: 1 if at least half of the frames are in the user's summary. So curves remain summaries, for which F can
be computed. Their borders move by less than 8 frames, and shorter choices vanish. `annotated_frames` is the original
number of frames.

Reading needs scipy: pip install 'dsmoe-vl[summe]'.

Example:

    python -m data_tools.convert summe --videos SumMe/videos --annotations SumMe/GT --output shards/summe
"""

STEP = 15  # frames of a part, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--videos` and `--annotations`."""
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="folder of the videos")
    parser.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder GT of the .mat files")


def records(arguments: argparse.Namespace) -> Iterator[Record]:
    """One record per .mat file, sorted by name.

    Raises DataError if a folder or scipy is missing, or a file is not of SumMe.
    """
    folder = existing_folder(arguments.videos, "--videos")
    files = sorted(existing_folder(arguments.annotations, "--annotations").glob("*.mat"))
    if not files:
        raise DataError(f"--annotations {arguments.annotations}: no .mat files: give the folder GT of SumMe")
    for path in files:
        media = video_path(folder, path.stem)
        try:
            curves, frames = binary_parts(_read(path))
        except Problem as problem:
            yield Record(path.stem, "video", media, [], problem=str(problem))
            continue
        meta = {
            "summary": path.stem.replace("_", " "),
            "saliency": curves.astype(int).tolist(),
            "annotated_frames": frames,
        }
        yield Record(path.stem, "video", media, [], meta)


def binary_parts(variables: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Which parts are in each user's summary: bool [users, ceil(frames / STEP)]; and the number of frames.

    Raises Problem if `user_score` has an invalid score or is not `nFrames` long.
    """
    selected = checked_scores(variables["user_score"].T, 0, np.inf) > 0
    frames = selected.shape[1]
    expected = variables["nFrames"].ravel().tolist()
    if expected != [frames]:
        raise Problem(f"unequal annotations: user_score of {frames} frames, nFrames {expected}")
    parts = -(-frames // STEP)
    borders = np.arange(parts + 1) * frames // parts
    lengths = np.diff(borders)
    counts = np.add.reduceat(selected, borders[:-1], axis=1, dtype=np.int64)
    return 2 * counts >= lengths, frames


def _read(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("reading SumMe's .mat files needs scipy: pip install 'dsmoe-vl[summe]'") from error
    try:
        content = io.BytesIO(require_regular(path).read_bytes())
    except OSError as error:
        raise DataError(f"--annotations {path}: {error.strerror}") from error
    try:
        variables: dict[str, Any] = loadmat(content, variable_names=["user_score", "nFrames"])
    except Exception as error:  # loadmat raises anything for a damaged file
        raise DataError(f"--annotations {path}: not a MATLAB file, or saved without -v7: {error}") from error
    for name in ("user_score", "nFrames"):
        if name not in variables:
            raise DataError(f"--annotations {path}: no {name}: give the folder GT of SumMe")
    return variables
