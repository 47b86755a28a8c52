"""Vectors with names in the format of word2vec, binary and text, which gensim and many others read and write.

A line with the number of words and the width; then for each word the word, a space, and in the binary form `width`
floats of four bytes, in the text form as many numbers with spaces between and the end of the line. A word has no
blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dsmoe_vl.errors import DataError
from dsmoe_vl.files import replacing, require_regular

_CHUNK = 2**20  # bytes read at a time
_LONGEST = 4096  # bytes of a word
_WIDEST = 2**16
_FIRST_LINE = b"%-12d %d\n"  # of the same length for any number of words
_FIX = "write it as gensim's save_word2vec_format does"


@dataclass(frozen=True)
class WordVectors:
    """What a file has: its number of words, their `width`, and the vectors that were wanted, float32 [width]."""

    words: int
    width: int
    vectors: dict[str, np.ndarray]


def read_vectors(path: Path, wanted: Collection[str] | None = None) -> WordVectors:
    """The vectors of the words `wanted`, or of all. Others are passed over, so memory is that of the wanted ones. Of a
    word that occurs twice the first counts, as in gensim. Raises DataError with the place in the file."""
    names = None if wanted is None else frozenset(word.encode("utf-8", "replace") for word in wanted)
    found: dict[str, np.ndarray] = {}
    try:
        with require_regular(path).open("rb") as file:
            words, width = _header(path, file)
            read = _text if _is_text(file, width) else _binary
            for place, word, vector in read(path, file, words, width, names):
                if not np.isfinite(vector).all():
                    raise DataError(f"{path}, {place}: {word!r:.60} has values that are not finite: {_FIX}")
                found.setdefault(word.decode("utf-8", "replace"), vector)
            if file.read(_CHUNK).strip(b"\r\n \0"):
                raise DataError(f"{path}: there is more after its {words:,} words: correct its first line, or {_FIX}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: name a file of vectors in the format of word2vec") from None
    return WordVectors(words, width, found)


@contextmanager
def writing_vectors(path: Path, width: int) -> Iterator[Callable[[str, np.ndarray], None]]:
    """A function that writes one vector, float32 [width], in the binary form; at the end the file replaces `path`.
    Blanks in a name become `_`. The number of words is filled in at the end, so nothing is kept in memory."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_FIRST_LINE % (0, width))
        words = 0

        def write(name: str, vector: np.ndarray) -> None:
            nonlocal words
            assert vector.shape == (width,), f"{vector.shape} for a file of width {width}"
            file.write(word_of(name).encode("utf-8", "replace") + b" " + vector.astype("<f4").tobytes() + b"\n")
            words += 1

        yield write
        file.seek(0)
        file.write(_FIRST_LINE % (words, width))


def word_of(name: str) -> str:
    """A name as the format can have it: without blanks."""
    return "_".join(name.split()) or "_"


def _header(path: Path, file: BinaryIO) -> tuple[int, int]:
    line = file.readline(100)
    try:
        words, width = map(int, line.split())
    except ValueError:
        words = width = 0
    if words < 1 or not 1 <= width <= _WIDEST:
        raise DataError(
            f"{path}, line 1: {line[:40]!r} is not a number of words and a width of 1 to {_WIDEST}: {_FIX}; files of "
            "GloVe lack this line, gensim reads them with no_header=True"
        )
    return words, width


def _is_text(file: BinaryIO, width: int) -> bool:
    """Whether the first word has as many numbers behind it as it should, in letters."""
    start = file.tell()
    cells = file.readline(_LONGEST + 64 * width).split()
    file.seek(start)
    try:
        return len(list(map(float, cells[1:]))) == width
    except ValueError:
        return False


Row = tuple[str, bytes, np.ndarray]  # place, word, vector


def _text(path: Path, file: BinaryIO, words: int, width: int, names: frozenset[bytes] | None) -> Iterator[Row]:
    for line in range(2, words + 2):
        text = file.readline(_LONGEST + 64 * width)
        word, *cells = text.split() or [b""]
        if len(cells) != width:
            raise DataError(f"{path}, line {line}: {len(cells)} numbers after a word, not {width}: {_FIX}")
        if names is None or word in names:
            try:
                with np.errstate(over="ignore"):  # becomes infinite, which the caller reports
                    vector = np.array([float(cell) for cell in cells]).astype(np.float32)
                yield f"line {line}", word, vector
            except ValueError as error:
                raise DataError(f"{path}, line {line}: {error}: {_FIX}") from None


def _binary(path: Path, file: BinaryIO, words: int, width: int, names: frozenset[bytes] | None) -> Iterator[Row]:
    data, at, behind = b"", 0, file.tell()  # `behind`: place of data[0] in the file
    for number in range(1, words + 1):
        end = data.find(b" ", at)
        if end < 0 or end + 1 + 4 * width > len(data):
            behind += at
            data, at = data[at:] + file.read(_CHUNK + 4 * width + _LONGEST), 0
            end = data.find(b" ")
        word = data[at : max(end, 0)].lstrip(b"\n")
        if end < 0 or not word or len(word) > _LONGEST or end + 1 + 4 * width > len(data):
            place = f"byte {behind + at}"
            raise DataError(
                f"{path}, {place}: word {number:,} of {words:,} is not there or has no {width} values: {_FIX}"
            )
        if names is None or word in names:
            yield f"byte {behind + at}", word, np.frombuffer(data, "<f4", width, end + 1).astype(np.float32)
        at = end + 1 + 4 * width
    file.seek(behind + at)
