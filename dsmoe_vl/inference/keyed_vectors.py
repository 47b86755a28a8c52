"""Retrieval embeddings of shards as files of word2vec, which gensim's KeyedVectors and other tools open.

OUTPUT/
  media.bin    the picture or video of a sample, by its key
  text.bin     its captions, by KEY/NUMBER, from 0

All are unit vectors of one space, so a dot product of two is their similarity, also across the files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.word_vectors import word_of, writing_vectors
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.embed import embed_media_segments, embed_texts, retrieval_task
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.inference.media import BATCH, Failed, in_batches, open_media

MEDIA_NAME, TEXT_NAME = "media.bin", "text.bin"


@dataclass
class Counts:
    """What was written, and of the media: those without captions, those whose name had blanks, those left out."""

    media: int = 0
    texts: int = 0
    without_text: int = 0
    renamed: int = 0
    left_out: int = 0
    width: int = 0


def export_keyed_vectors(trained: TrainedModel, data: str, output: Path, failed: Failed) -> Counts:
    """Write the embeddings of all samples in `data`, a folder or URL of shards, to the new folder `output`.

    `failed` is called for media that cannot be used, and for a key that occurred before; their captions are left out
    too. Raises ConfigError for a model that has not learned retrieval, or if `output` is not empty; DataError if there
    is nothing to write. `output` is left empty then.
    """
    task, counts = retrieval_task(trained), Counts(width=trained.recipe.tasks.retrieval.embedding_width)
    media = open_media(data, trained.recipe.data)
    make_new_folder(output)
    seen: set[str] = set()

    def leave_out(name: str, reason: str) -> None:
        counts.left_out += 1
        failed(name, reason)

    def encode(sample: Sample) -> tuple[Segment, tuple[str, ...]]:
        return task.media(sample), contents_of(sample).captions

    try:
        with (
            writing_vectors(output / MEDIA_NAME, counts.width) as add_media,
            writing_vectors(output / TEXT_NAME, counts.width) as add_text,
        ):
            for batch in in_batches(media, encode, leave_out):
                named: list[tuple[str, tuple[str, ...]]] = []
                segments: list[Segment] = []
                for item, key, (segment, captions) in batch:
                    name = word_of(key)
                    if name in seen:
                        leave_out(item.place, f"the name {name} occurs twice: give samples keys of their own")
                        continue
                    seen.add(name)
                    counts.renamed += name != key
                    counts.without_text += not captions
                    named.append((name, captions))
                    segments.append(segment)
                if segments:
                    for (name, _), vector in zip(named, embed_media_segments(trained, segments), strict=True):
                        add_media(name, vector)
                        counts.media += 1
                texts = [(f"{name}/{n}", text) for name, captions in named for n, text in enumerate(captions)]
                for first in range(0, len(texts), BATCH):
                    some = texts[first : first + BATCH]
                    for (name, _), vector in zip(some, embed_texts(trained, [text for _, text in some]), strict=True):
                        add_text(name, vector)
                        counts.texts += 1
        if not counts.media:
            raise DataError(f"{data}: none of its {counts.left_out} pictures and videos can be used")
        if not counts.texts:
            (output / TEXT_NAME).unlink()  # readers refuse a file without words
    except BaseException:
        for written in output.iterdir():  # else the next try would find a folder that is not empty
            written.unlink()
        raise
    return counts


def describe_counts(counts: Counts, say: Callable[[str], None] = print) -> None:
    """A line for each file, and for all that was changed or left out."""
    say(f"  {MEDIA_NAME}: {counts.media:,} pictures and videos, vectors of {counts.width}")
    if counts.texts:
        say(f"  {TEXT_NAME}: {counts.texts:,} captions as KEY/NUMBER")
    else:
        say(f"  no {TEXT_NAME}: no sample has a caption")
    for count, what in (
        (counts.without_text if counts.texts else 0, "without captions"),
        (counts.renamed, "whose keys had blanks, which became _"),
        (counts.left_out, "left out, named above"),
    ):
        if count:
            say(f"  {count:,} pictures and videos {what}")
