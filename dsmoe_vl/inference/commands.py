"""The commands of `launch/generate.py`: many files in, lines and files out. A bad file does not stop the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dsmoe_vl.command import has_lost_reader
from dsmoe_vl.console import one_line, printable, tell
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.drawing.pages import Tile, page
from dsmoe_vl.drawing.picture_file import save_picture
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.files import distinct_names, write_json
from dsmoe_vl.inference.embed import embed_media, embed_recordings, embed_texts
from dsmoe_vl.inference.generate import caption_task, texts
from dsmoe_vl.inference.index import Hit, MediaIndex, update_index
from dsmoe_vl.inference.load import TrainedModel, require_task
from dsmoe_vl.inference.media import Media, first_picture, format_hint, in_batches, read_file, recorded
from dsmoe_vl.inference.summarize import summarize
from dsmoe_vl.inference.summary_files import write_summary
from dsmoe_vl.inference.token_search import Search
from dsmoe_vl.tasks.transcript import TranscriptTask

_WITHOUT_INDEX = 200  # files; above this number `retrieve` suggests --index


@dataclass
class Outcome:
    """Number of files answered, and of files that could not be used."""

    answered: int = 0
    bad: int = 0

    def failed(self, name: str, reason: str) -> None:
        """Count a bad file and print it to standard error."""
        self.bad += 1
        print_error(reason if name in reason else f"{name}: {reason}")

    @property
    def status(self) -> int:
        """Exit status: 0; 1 if some files were bad; 2 if there is no answer."""
        if not self.answered:
            return 2
        return 1 if self.bad else 0


class Question(NamedTuple):
    """The query of a search: exactly one of these."""

    text: str | None = None
    image: Path | None = None
    video: Path | None = None
    speech: Path | None = None


def print_error(message: str) -> None:
    """Print the message to standard error as one line."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def caption_media(
    trained: TrainedModel, media: Iterable[Media], max_tokens: int, search: Search, json_file: Path | None
) -> int:
    """Print `FILE<TAB>caption` lines; also write them to `json_file`, if given. Returns the exit status.

    Raises ConfigError if the model has not learned captions or the file cannot be written.
    """
    return _write_texts(trained, media, caption_task(trained).prompt, "caption", max_tokens, search, json_file)


def transcribe(
    trained: TrainedModel, media: Iterable[Media], max_tokens: int, search: Search, json_file: Path | None
) -> int:
    """Print `FILE<TAB>transcript` lines of recordings, as `caption_media` does."""
    prompt = trained.task(TranscriptTask).prompt
    return _write_texts(trained, media, prompt, "transcript", max_tokens, search, json_file)


def _write_texts(
    trained: TrainedModel,
    media: Iterable[Media],
    prompt: Callable[[Sample], Segment],
    what: str,
    max_tokens: int,
    search: Search,
    json_file: Path | None,
) -> int:
    outcome = Outcome()
    rows: list[dict[str, str]] = []
    for batch in in_batches(media, prompt, outcome.failed):
        written = texts(trained, [asked for _, _, asked in batch], max_tokens, search)
        for (_, name, _), text in zip(batch, written, strict=True):
            rows.append({"file": name, what: text})
            print(f"{printable(name)}\t{one_line(text)}", flush=True)
        if json_file is None and has_lost_reader():  # nobody wants the others, as with `| head -1`
            break
    outcome.answered = len(rows)
    if json_file is not None:
        try:
            write_json(json_file, rows)
        except OSError as error:
            raise ConfigError(f"{json_file} cannot be written: {error.strerror}; name another file") from None
    return outcome.status


def retrieve(
    trained: TrainedModel,
    media: Sequence[Media],
    question: Question,
    top: int,
    index_file: Path | None,
    grid_file: Path | None,
) -> int:
    """Print `score<TAB>FILE` lines of the `top` nearest media; draw them to `grid_file`, if given. Returns the exit
    status.

    Raises ConfigError if the model has not learned retrieval or a file cannot be written, DataError if the query cannot
    be read or `index_file` is not an index.
    """
    require_task(trained, "retrieval")
    old = MediaIndex.load(index_file) if index_file is not None and index_file.exists() else None
    vector, picture = _ask(trained, question)
    outcome = Outcome()
    if index_file is None:
        if len(media) > _WITHOUT_INDEX:
            print(f"embedding {len(media)} files; --index FILE saves them for the next query", file=sys.stderr)
        index, _ = update_index(None, trained, media, outcome.failed)
    else:
        index, embedded = update_index(old, trained, media, outcome.failed, lambda part: part.save(index_file))
        if old is None or embedded or index.rows != old.rows:
            index.save(index_file)
        again = "; the old index was made by another model" if old is not None and old.model != index.model else ""
        tell(f"index {index_file}: {len(index.rows)} files, {embedded} embedded now{again}", sys.stderr)
    outcome.answered = len(index.rows)
    hits = index.search(vector, top) if index.rows else []
    for hit in hits:
        print(f"{hit.score:.4f}\t{printable(hit.row.name)}")
    if grid_file is not None and hits:
        _save(grid(media, hits, question, picture), grid_file)
    return outcome.status


def grid(media: Sequence[Media], hits: Sequence[Hit], question: Question, picture: Image.Image | None) -> Image.Image:
    """Page of the pictures found (a video as its first frame) with scores and names, and the query."""
    by_place = {item.place: item for item in media}
    tiles = []
    for rank, hit in enumerate(hits, 1):
        try:
            shown = first_picture(by_place[hit.row.place].read())
        except DataError:  # removed in the meantime, or the first frame is damaged
            shown = Image.new("RGB", (4, 3), "gray")
        tiles.append(Tile(shown, (f"{rank}.  {hit.score:.3f}", os.path.basename(hit.row.name))))
    asked = question.text or (question.speech.name if question.speech else None)
    if picture is not None:
        asked = f"like {(question.image or question.video or Path()).name}"
    return page(tiles, asked or "", beside=picture)


def summarize_videos(
    trained: TrainedModel, videos: Sequence[Path], output: Path, max_tokens: int, count: int | None
) -> int:
    """Write `OUTPUT/NAME/` for each video and print a line. `count`: see `VideoSummary.key_frames`. Returns the exit
    status.

    Raises ConfigError if the model has not learned summaries or a folder cannot be written.
    """
    require_task(trained, "summary")
    outcome = Outcome()
    for path, name in zip(videos, distinct_names(path.stem for path in videos), strict=True):
        try:
            sample = read_file(path, "video")
        except DataError as error:
            outcome.failed(str(path), str(error))
            continue
        try:
            (summary,) = summarize(trained, [sample], max_tokens)
            write_summary(trained, sample, summary, output / name, count)
        except DataError as error:
            outcome.failed(str(path), f"{error}; {format_hint(sample)}")
            continue
        times = ", ".join(f"{summary.seconds[number]:.2f} s" for number in summary.key_frames(count))
        folder = printable(str(output / name))
        print(f"{printable(str(path))}\t{one_line(summary.text)}\t{times}\t{folder}", flush=True)
        outcome.answered += 1
    return outcome.status


def _ask(trained: TrainedModel, question: Question) -> tuple[np.ndarray, Image.Image | None]:
    """The query's embedding, and its picture, if any."""
    if question.text is not None:
        if not question.text.strip():
            raise ConfigError("--text is empty: give the words to search for")
        return embed_texts(trained, [question.text])[0], None
    if question.speech is not None:
        return embed_recordings(trained, [recorded(question.speech)])[0], None
    path, kind = (question.image, "image") if question.image is not None else (question.video, "video")
    assert path is not None, "exactly one of them is given"
    sample = read_file(path, kind)
    try:
        return embed_media(trained, [sample])[0], first_picture(sample)
    except DataError as error:
        raise DataError(f"{path}: {error}; {format_hint(sample)}") from None


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file") from None
    tell(f"wrote {path}", sys.stderr)
