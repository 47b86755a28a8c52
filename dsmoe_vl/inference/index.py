"""An index of pictures and videos: their embeddings, reused while they are valid. W: embedding width.

The file is a safetensors file with one tensor, `embeddings`, float32 [n, W], unit rows. Its metadata contains the hash
of the model and, as JSON, for each row the name to show, the place, and the size and time of the file. A row is reused
while model, place, size and time are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import require_regular, write_atomically
from dsmoe_vl.inference.embed import embed_media_segments, retrieval_task
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import Failed, Media, in_batches

_FORMAT = "dsmoe_vl media index 1"
_READING = (
    "image_max_patches", "frame_max_patches", "video_frames", "video_sampling", "video_fps", "frame_pool",
)  # fmt: skip
_PARTS = 128  # batches of embeddings between two calls of `checkpoint`


class Row(NamedTuple):
    """The picture or video of an embedding; see `Media`."""

    name: str
    place: str
    size_bytes: int
    mtime_ns: int


class Hit(NamedTuple):
    """A row found by a search; `score`: its cosine similarity to the query."""

    score: float
    row: Row


@dataclass
class MediaIndex:
    """`rows` and their `embeddings`, float32 [n, W], made by the model with the hash `model`."""

    model: str
    rows: list[Row] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @classmethod
    def load(cls, path: Path) -> MediaIndex:
        """Read an index. Raises DataError if the file is not one."""
        try:
            with safe_open(require_regular(path), "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError
                rows = [Row(*row) for row in json.loads(metadata["rows"])]
                embeddings = file.get_tensor("embeddings")
                if len(rows) != len(embeddings):
                    raise ValueError
                return cls(metadata["model"], rows, embeddings)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            raise DataError(f"{path} is not an index of `retrieve`: name another file, or remove this one") from None

    def save(self, path: Path) -> None:
        """Write atomically. Raises DataError if the file cannot be written."""
        metadata = {"format": _FORMAT, "model": self.model, "rows": json.dumps(self.rows)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"embeddings": self.embeddings}, metadata))
        except OSError as error:
            raise DataError(f"index {path} cannot be written: {error.strerror}; name another file") from None

    def search(self, question: np.ndarray, top: int) -> list[Hit]:
        """The `top` rows nearest to a unit vector, float32 [W], the nearest first; ties in the index's order."""
        scores = self.embeddings @ question
        return [Hit(float(scores[i]), self.rows[i]) for i in np.argsort(-scores, kind="stable")[:top]]


def model_hash(trained: TrainedModel) -> str:
    """Hex sha256 of everything that embeddings depend on: the weights file, the tokenizer, and the recipe's settings of
    the model, of retrieval and of reading pictures."""
    recipe = trained.recipe
    reading = [getattr(recipe.data, name) for name in _READING]
    settings = (recipe.model, recipe.moe, recipe.tasks.retrieval, reading, trained.tokenizer.sha256)
    digest = hashlib.sha256(repr(settings).encode())
    for chunk in WeightsFile(trained.checkpoint).chunks():
        digest.update(chunk)
    return digest.hexdigest()


def update_index(
    old: MediaIndex | None,
    trained: TrainedModel,
    media: Sequence[Media],
    failed: Failed,
    checkpoint: Callable[[MediaIndex], None] = lambda index: None,
) -> tuple[MediaIndex, int]:
    """An index of all readable `media`, and the number of media that were embedded now.

    `checkpoint` is called from time to time with the index so far, so that an interrupted run can be continued. Raises
    ConfigError if the model has not learned retrieval.
    """
    task = retrieval_task(trained)
    index = MediaIndex(model_hash(trained))
    known = {} if old is None or old.model != index.model else {row[1:]: number for number, row in enumerate(old.rows)}
    reused = [number for item in media if (number := known.get(item[:3])) is not None]
    if old is not None and reused:
        index.rows, index.embeddings = [old.rows[number] for number in reused], old.embeddings[reused]
    parts, embedded = [index.embeddings] if reused else [], 0
    for batch in in_batches([item for item in media if item[:3] not in known], task.media, failed):
        parts.append(embed_media_segments(trained, [segment for _, _, segment in batch]))
        index.rows.extend(Row(name, *item[:3]) for item, name, _ in batch)
        embedded += len(batch)
        if len(parts) > _PARTS:
            index.embeddings = np.concatenate(parts)
            parts = [index.embeddings]
            checkpoint(index)
    if parts:
        index.embeddings = np.concatenate(parts)
    return index, embedded
