"""Train a SentencePiece tokenizer on the captions of shards.

The model is lossless: it does not normalise text, and unknown characters become bytes. Special tokens are control
symbols, so "<image>" in a caption is ordinary text.
"""

from __future__ import annotations

import argparse
import io
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tqdm import tqdm

from dsmoe_vl.command import run
from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.console import tell
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.files import write_atomically

CHUNK = 100_000  # characters of at most four bytes: less than MAX_BYTES
MAX_BYTES = 2**20  # longer lines are dropped by SentencePiece without an error
# SentencePiece drops lines with one of these: NUL, and the character that it uses for unknown ones.
FORBIDDEN = {0x0000: None, 0x2585: None}


def train(
    data: list[str] | list[Path], output: Path, vocab_size: int = 8000, max_samples: int = 1_000_000, seed: int = 1
) -> Tokenizer:
    """Train on the texts of the shard folders `data` and write the model file `output`.

    Args:
        vocab_size: pieces, including control symbols and the 256 bytes. If the texts have too few pieces, the
            vocabulary is smaller and a line is printed.
        max_samples: texts at most; of more, a uniform sample is drawn with `seed`.

    Raises:
        DataError: no text, folders without shards, a vocabulary too small, or an `output` that exists. Samples that
            cannot be read are counted and printed.
    """
    if output.exists():
        raise DataError(f"{output} exists, and runs may depend on it: delete it first, or choose another --output")
    if max_samples < 1:
        raise DataError(f"--max-samples {max_samples}: must be positive")
    left_out = LeftOut()
    samples = (
        sample
        for folder in data
        for sample in iterate_samples(SourceConfig.at(folder), media=False, failed=left_out.unreadable)
    )
    texts = left_out.watch(tqdm(samples, desc="reading", unit="sample", disable=None))
    chosen, total = reservoir(texts, max_samples, random.Random(seed))
    if not any(_lines(chosen)):
        reasons = "; ".join(left_out.describe())
        raise DataError(f"no captions in {', '.join(map(str, data))}: a tokenizer needs text ({reasons})")
    for line in left_out.describe():
        tell(f"not used: {line}")
    if len(chosen) < total:
        print(f"training on {len(chosen)} of {total} texts, drawn with seed {seed} (--max-samples)")
    model = _fit(chosen, vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, model)
    return Tokenizer(output)


class LeftOut:
    """Counts the samples without a text, those with entries that are no text, and those that cannot be read."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()  # by kind of problem
        self._first: dict[str, str] = {}

    def watch(self, samples: Iterable[Sample]) -> Iterator[str]:
        """All texts of the samples that could be read."""
        for sample in samples:
            contents = contents_of(sample)
            yield from contents.texts
            for problem in contents.flaws if contents.texts else (contents.no_caption,):
                self._count(sample.key, problem)

    def unreadable(self, shard: str, number: int, error: DataError) -> None:
        """Count a sample that cannot be read."""
        self._count(f"{shard}, number {number}", str(error))

    def _count(self, place: str, problem: str) -> None:
        kind, _, detail = problem.partition(": ")
        self._counts[kind] += 1
        self._first.setdefault(kind, f"{place}: {detail}")

    def describe(self) -> list[str]:
        """A line per kind of problem, with its first place."""
        return [f"{count} x {kind}, the first in {self._first[kind]}" for kind, count in self._counts.most_common()]


def reservoir(texts: Iterable[str], size: int, rng: random.Random) -> tuple[list[str], int]:
    """A uniform sample of up to `size` texts, and the number of all texts (Vitter's algorithm R, one pass)."""
    chosen: list[str] = []
    total = 0
    for total, text in enumerate(texts, 1):
        if len(chosen) < size:
            chosen.append(text)
        elif (place := rng.randrange(total)) < size:
            chosen[place] = text
    return chosen, total


def _lines(texts: list[str]) -> Iterator[str]:
    """Lines that SentencePiece does not drop."""
    for text in texts:
        clean = text.encode("utf-8", "replace").decode().translate(FORBIDDEN)
        for start in range(0, len(clean), CHUNK):
            yield clean[start : start + CHUNK]


def _fit(texts: list[str], vocab_size: int) -> bytes:
    """The trained model file. It has fewer pieces than `vocab_size` if the texts have too few."""
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",  # keeps frequent words whole in small corpora too, where unigram runs out of pieces
            vocab_size=vocab_size,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=list(CONTROL_SYMBOLS),
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=MAX_BYTES,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        too_high = re.search(r"too high \(\d+\).*<= (\d+)", str(error))
        if too_high and int(too_high[1]) < vocab_size:
            print(f"the texts have only {too_high[1]} pieces, not {vocab_size} (--vocab-size)")
            return _fit(texts, int(too_high[1]))
        too_low = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
        if too_low:
            raise DataError(
                f"--vocab-size {vocab_size}: the characters of these texts, the 256 bytes and the special tokens alone "
                f"need {too_low[1]} pieces"
            ) from error
        raise DataError(f"no tokenizer of {vocab_size} pieces (--vocab-size) fits these texts: {error}") from error
    return model.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    options = commands.add_parser(
        "train",
        help="train a model on the captions of shards",
        description="Example:\n\n    python -m data_tools.tokenizer train --data shards/train --output tokenizer.model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--data", required=True, nargs="+", metavar="SHARDS", help="folders or URLs of shards")
    options.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model file, tokenizer.model")
    options.add_argument("--vocab-size", type=int, default=8000, metavar="N", help="pieces (%(default)s)")
    options.add_argument("--max-samples", type=int, default=1_000_000, metavar="N", help="texts (%(default)s)")
    options.add_argument("--seed", type=int, default=1, help="of the choice of texts (%(default)s)")
    given = parser.parse_args(arguments)

    def command() -> int:
        tokenizer = train(given.data, given.output, given.vocab_size, given.max_samples, given.seed)
        tell(f"wrote {given.output}: {tokenizer.size} pieces, sha256 {tokenizer.sha256}")
        return 0

    return run(command)
