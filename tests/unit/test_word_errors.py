"""The word error rate against a plain dynamic programme."""

from __future__ import annotations

import random

import pytest

from dsmoe_vl.metrics.word_errors import edits, transcript_metrics


def _plain(said, wanted):
    table = [[row + column if not row * column else 0 for column in range(len(wanted) + 1)]
             for row in range(len(said) + 1)]  # fmt: skip
    for row, one in enumerate(said, 1):
        for column, other in enumerate(wanted, 1):
            table[row][column] = min(
                table[row - 1][column] + 1, table[row][column - 1] + 1, table[row - 1][column - 1] + (one != other)
            )
    return table[-1][-1]


def test_edits_equal_those_of_a_plain_table():
    rng = random.Random(1)
    for _ in range(500):
        said, wanted = ([rng.choice("abcd") for _ in range(rng.randrange(9))] for _ in range(2))
        assert edits(said, wanted) == _plain(said, wanted), (said, wanted)


def test_rates_count_words_of_all_references():
    scores = transcript_metrics(["a red Circle.", "two squares"], ["a red circle", "two green squares here"])
    assert scores == {"word_error_rate": 2 / 7, "exact": 0.5}
    assert transcript_metrics(["", "x y z"], ["a", "x"])["word_error_rate"] == 3 / 2  # more is said than was spoken


def test_characters_are_words_where_there_are_no_spaces():
    assert transcript_metrics(["红色圆形"], ["红色方形"], "characters")["word_error_rate"] == 1 / 4


@pytest.mark.parametrize(("said", "wanted"), [([], []), (["a"], ["a", "b"]), (["a"], ["..."])])
def test_what_cannot_be_scored(said, wanted):
    with pytest.raises(ValueError, match=r"transcripts|no reference has a word"):
        transcript_metrics(said, wanted)
