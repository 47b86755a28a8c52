"""Random packs in the shape that the model reads, for tests of everything behind the loader."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsmoe_vl.config.model import FRAMES_OF_STATE, SpeechConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.pack import PackShape, assemble
from dsmoe_vl.data.pack_shape import SpeechShape
from dsmoe_vl.data.recording import whole_cells
from dsmoe_vl.data.segment import IGNORE, Modality, Pack, Picture, Recording, Segment

SHAPE = PackShape(length=96, patches=96, patch_size=4, merge=2)
SPEECH = SpeechConfig(layers=2, width=16, heads=2, ffn_width=32, bands=8, merge=3)
CELL = SPEECH.merge * FRAMES_OF_STATE  # frames
HEARING = replace(SHAPE, speech=SpeechShape(30 * CELL, CELL, SPEECH.bands))
VOCABULARY = 64
_SIZES = (lambda s: s.length, lambda s: s.patch_count, lambda s: s.frame_count)
_GRIDS = ((4, 4), (2, 4), (4, 2))


def _text(rng: np.random.Generator, least: int = 3) -> np.ndarray:
    return rng.integers(8, VOCABULARY, rng.integers(least, 12)).astype(np.int32)


def _pictures(rng: np.random.Generator, frames: int) -> tuple[list[Picture], int]:
    """One image, or some frames of one size with a token a cell; and how many vision tokens they fill."""
    grid = _GRIDS[rng.integers(len(_GRIDS))] if frames == 0 else (2, 4)
    cells = grid[0] * grid[1] // 4
    times = [-1.0] if frames == 0 else [0.5 * i for i in range(frames)]
    return [
        Picture(
            rng.integers(0, 256, (4 * cells, 3 * SHAPE.patch_size**2), dtype=np.uint8),
            grid,
            time,
            np.arange(cells, dtype=np.int32) + i * cells,
        )
        for i, time in enumerate(times)
    ], cells * len(times)


def _segment(rng: np.random.Generator, task: int, frames: int, text: bool, frame_tokens: bool = False) -> Segment:
    """Vision tokens, one task token (or embedding token), and with `text` a text with labels."""
    pictures, vision = _pictures(rng, frames)
    if frame_tokens:
        for i, picture in enumerate(pictures):
            picture.frame_token = vision + i
        vision += len(pictures)
    words = _text(rng) if text else np.zeros(0, np.int32)
    tokens = np.concatenate((np.full(vision + 1, 7, np.int32), words))
    labels = np.full(len(tokens), IGNORE, np.int32)
    if text:
        labels[vision:] = [*words, 2]
    modality = np.full(len(tokens), Modality.TEXT, np.int32)
    modality[:vision] = Modality.VIDEO if frames else Modality.IMAGE
    return Segment(task, tokens, labels, modality, pictures)


def caption(rng: np.random.Generator, frames: int = 0) -> list[Segment]:
    """One caption of an image, or of a video with that many frames."""
    return [_segment(rng, task_number("caption"), frames, text=True)]


def pair(rng: np.random.Generator, frames: int = 0) -> list[Segment]:
    """One retrieval pair; ids repeat now and then."""
    words = _text(rng)
    media = _segment(rng, task_number("retrieval"), frames, text=False)
    text = Segment(task_number("retrieval"), words, np.full_like(words, IGNORE), np.full_like(words, Modality.TEXT))
    media.pair = text.pair = int(rng.integers(6))
    return [media, text]


def spoken(rng: np.random.Generator, frames: int = 0, words: bool = True) -> Segment:
    """Speech tokens of a recording, a task token, and with `words` what was said, with labels."""
    count = frames or int(rng.integers(5, 60))
    mel = whole_cells(rng.normal(size=(count, SPEECH.bands)).astype(np.float32), SPEECH.merge)
    heard = len(mel) // CELL
    said = _text(rng) if words else np.zeros(0, np.int32)
    tokens = np.concatenate((np.full(heard + 1, 7, np.int32), said))
    labels = np.full(len(tokens), IGNORE, np.int32)
    if words:
        labels[heard:] = [*said, 2]
    modality = np.where(np.arange(len(tokens)) < heard, Modality.SPEECH, Modality.TEXT).astype(np.int32)
    return Segment(task_number("transcript"), tokens, labels, modality, recording=Recording(mel, 0))


def spoken_pair(rng: np.random.Generator) -> list[Segment]:
    """A retrieval pair of an image and a recording."""
    media, query = pair(rng)[0], spoken(rng, words=False)
    query.task, query.pair = media.task, media.pair
    return [media, query]


def summary(rng: np.random.Generator, frames: int = 3) -> list[Segment]:
    """One video summary with importance and compared frames."""
    segment = _segment(rng, task_number("summary"), frames, text=True, frame_tokens=True)
    segment.importance = rng.random(frames, dtype=np.float32)
    difference = segment.importance[:, None] - segment.importance[None, :]
    segment.ranked = np.argwhere(difference > 0.1).astype(np.int32)
    return [segment]


def text_only(rng: np.random.Generator) -> list[Segment]:
    """Words without any picture, retrieval pair or summary."""
    words = _text(rng, least=8)
    labels = np.concatenate((words[1:], [2])).astype(np.int32)
    return [Segment(task_number("caption"), words, labels, np.full_like(words, Modality.TEXT))]


def mixed_pack(seed: int, without: tuple[str, ...] = (), hears: bool = False) -> Pack:
    """A pack of all tasks, of images and of videos, some padding at its end; a pure function of its arguments.

    `without` names tasks and "image"; text alone where nothing is left. `hears`: for a model with SPEECH, also of
    recordings.
    """
    shape = HEARING if hears else SHAPE
    rng = np.random.default_rng(seed)
    makers = [
        ({"caption", "image"}, caption),
        ({"caption"}, lambda r: caption(r, 2)),
        ({"retrieval", "image"}, pair),
        ({"retrieval"}, lambda r: pair(r, 2)),
        ({"summary"}, summary),
    ]
    if hears:
        makers += [({"transcript"}, lambda r: [spoken(r)]), ({"retrieval", "image"}, spoken_pair)]
    choice = [make for holds, make in makers if not holds.intersection(without)] or [text_only]
    segments: list[Segment] = []
    while True:
        more = choice[rng.integers(len(choice))](rng)
        together = [*segments, *more]
        used = [sum(size(s) for s in together) for size in _SIZES]
        if any(n > most for n, most in zip(used, (shape.length - 2, shape.patches, shape.frames), strict=True)):
            return assemble(segments, shape)
        segments = together
