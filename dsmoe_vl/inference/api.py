"""A trained model in a few lines of Python: `from dsmoe_vl import load; load("runs/NAME").caption("photo.jpg")`.

A picture is a path, encoded bytes, a PIL image or an array uint8 [h, w, 3]; a video or a recording of speech is a path
or encoded bytes. A method that takes one item also takes a list, and returns a list (embeddings: an array with a row
per item). W: embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from PIL import Image

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.embed import embed_media, embed_recordings, embed_texts
from dsmoe_vl.inference.generate import MAX_TOKENS, caption, transcribe
from dsmoe_vl.inference.load import TrainedModel, load_run
from dsmoe_vl.inference.media import BATCH, recorded, to_sample
from dsmoe_vl.inference.summarize import VideoSummary, summarize
from dsmoe_vl.inference.token_search import Search

Video = str | os.PathLike[str] | bytes
Picture = Video | Image.Image | np.ndarray

R = TypeVar("R")


def load(run: str | os.PathLike[str], device: str | None = None) -> Model:
    """Load the newest checkpoint of a run, or an exported model. `device`: "cpu", "cuda", "cuda:N"; default: a GPU if
    available.

    Raises CheckpointError if there is no checkpoint, ConfigError if the device is not available.
    """
    return Model(load_run(Path(run), device))


class Model:
    """A trained model. Methods raise ConfigError if it has not learned the task, DataError for unreadable media."""

    def __init__(self, trained: TrainedModel) -> None:
        self.trained = trained

    @overload
    def caption(self, picture: Picture, *, max_tokens: int = ..., **search: Any) -> str: ...
    @overload
    def caption(self, picture: Sequence[Picture], *, max_tokens: int = ..., **search: Any) -> list[str]: ...
    def caption(self, picture: Any, *, max_tokens: int = MAX_TOKENS, **search: Any) -> Any:
        """Caption of a picture. `search`: `beams`, or `top_p`, `temperature` and `seed`; see `Search`."""
        return self._caption(picture, "image", max_tokens, Search(**search))

    @overload
    def caption_video(self, video: Video, *, max_tokens: int = ..., **search: Any) -> str: ...
    @overload
    def caption_video(self, video: Sequence[Video], *, max_tokens: int = ..., **search: Any) -> list[str]: ...
    def caption_video(self, video: Any, *, max_tokens: int = MAX_TOKENS, **search: Any) -> Any:
        """Caption of a video; `search` as in `caption`."""
        return self._caption(video, "video", max_tokens, Search(**search))

    @overload
    def transcribe(self, recording: Video, *, max_tokens: int = ..., **search: Any) -> str: ...
    @overload
    def transcribe(self, recording: Sequence[Video], *, max_tokens: int = ..., **search: Any) -> list[str]: ...
    def transcribe(self, recording: Any, *, max_tokens: int = MAX_TOKENS, **search: Any) -> Any:
        """The words of a recording; `search` as in `caption`."""
        options = Search(**search)
        return _mapped(
            recording, lambda some: transcribe(self.trained, [recorded(one) for one in some], max_tokens, options)
        )

    def embed_text(self, text: str | Sequence[str]) -> np.ndarray:
        """Unit vector of a text, float32 [W]; of a list, [n, W]. Raises DataError if an item is not a str."""
        for one in text if isinstance(text, (list, tuple)) else [text]:
            if not isinstance(one, str):
                raise DataError(f"a text cannot be made from {type(one).__name__}: give a str")
        return _stacked(text, lambda some: list(embed_texts(self.trained, some)))

    def embed_image(self, picture: Picture | Sequence[Picture]) -> np.ndarray:
        """Unit vector of a picture, float32 [W]; of a list, [n, W]."""
        return self._embed(picture, "image")

    def embed_video(self, video: Video | Sequence[Video]) -> np.ndarray:
        """Unit vector of a video, float32 [W]; of a list, [n, W]."""
        return self._embed(video, "video")

    def embed_speech(self, recording: Video | Sequence[Video]) -> np.ndarray:
        """Unit vector of a spoken query, float32 [W], to compare with pictures and videos; of a list, [n, W]."""
        return _stacked(recording, lambda some: list(embed_recordings(self.trained, [recorded(one) for one in some])))

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> Any:
        """Cosine similarity of embeddings, -1 to 1: [W] with [W] gives a float, [n, W] with [m, W] an array [n, m].

        Raises DataError for embeddings of different widths.
        """
        shapes = np.shape(a), np.shape(b)
        if not all(len(shape) in (1, 2) for shape in shapes) or shapes[0][-1] != shapes[1][-1]:
            raise DataError(
                f"embeddings of {list(shapes[0])} and {list(shapes[1])} cannot be compared: give [W] or [n, W]"
            )
        cosines = np.asarray(a) @ np.asarray(b).T
        return float(cosines) if cosines.ndim == 0 else cosines

    @overload
    def summarize(self, video: Video, *, max_tokens: int = ..., **search: Any) -> VideoSummary: ...
    @overload
    def summarize(self, video: Sequence[Video], *, max_tokens: int = ..., **search: Any) -> list[VideoSummary]: ...
    def summarize(self, video: Any, *, max_tokens: int = MAX_TOKENS, **search: Any) -> Any:
        """Summary of a video: `text`, and `seconds`, `importance` and `key_frames()` of the sampled frames."""
        options = Search(**search)
        return _mapped(
            video, lambda some: summarize(self.trained, _samples(some, "video"), max_tokens=max_tokens, search=options)
        )

    def _caption(self, media: Any, kind: str, max_tokens: int, search: Search) -> Any:
        return _mapped(media, lambda some: caption(self.trained, _samples(some, kind), max_tokens, search))

    def _embed(self, media: Any, kind: str) -> np.ndarray:
        return _stacked(media, lambda some: list(embed_media(self.trained, _samples(some, kind))))


def _samples(media: Iterable[Any], kind: str) -> list[Sample]:
    return [to_sample(one, kind) for one in media]


def _mapped(given: Any, answer: Callable[[list[Any]], list[R]]) -> R | list[R]:
    """The answer for one item, a list of answers for a list or tuple; runs batch by batch."""
    if not isinstance(given, (list, tuple)):
        return answer([given])[0]
    waiting, answers = iter(given), list[R]()
    while batch := list(islice(waiting, BATCH)):
        answers += answer(batch)
    return answers


def _stacked(given: Any, embed: Callable[[list[Any]], list[np.ndarray]]) -> np.ndarray:
    found = _mapped(given, embed)
    if isinstance(found, list) and not found:
        raise DataError("nothing to embed: the list is empty")
    return np.stack(found) if isinstance(found, list) else found
