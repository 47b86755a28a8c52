"""Words and caption metrics by hand. `tests/parity/test_caption_metrics.py` holds the same cases to coco-caption."""

import importlib.util
import itertools
import math
import random
import shutil
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.captions import Captioned, CaptionEvaluation
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.task_evaluation import Options
from dsmoe_vl.evaluation.texts import TEXT_LABELS, text_scores
from dsmoe_vl.metrics import meteor_spice as java
from dsmoe_vl.metrics.captions import (
    _common_length,
    bleu,
    bleu_of_counts,
    caption_metrics,
    cider_d,
    rouge_l,
    tokenized,
)
from dsmoe_vl.metrics.characters import split_characters
from dsmoe_vl.metrics.ptb_tokenizer import tokenize

NO_BREAK = "\u00a0"
# Texts and their words, no-break spaces written as "_".
WORDS = {
    "A man can't ride TWO horses.": "a man ca n't ride two horses",
    "I cannot; they won’t, I'm gonna!": "i can not they wo n't i 'm gon na",
    "the dogs' owner's dog, 'twas Gimme's": "the dogs owner 's dog 't was gimme 's",
    "a T-shirt, x-ray and 3-year-old": "a t-shirt x-ray and 3-year-old",
    "a red (grey) [blue] {green} ball": "a red -lrb- grey -rrb- -lsb- blue -rsb- -lcb- green -rcb- ball",
    "at 12:30 p.m. in the U.S.A. or u.s.": "at 12:30 p.m. in the u.s.a. or u.s.",
    "Mr. Smith, Inc. of St. Louis no. 5, no. x": "mr. smith inc. of st. louis no. 5 no x",
    "...wait... what?! No!!! Ok. .. . .": "wait what ?! no !!! ok",
    "a--b --- c – d — e - f ----- g": "a b c d e f ----- g",
    "\"quoted\" “text” ‘single’ «x» it`s ``a''": "quoted text single x it s a",
    "$5, £3.50, 4€, 10¢, US$1,000 and 50%": "$ 5 # 3.50 4 $ 10 cents us$ 1,000 and 50 %",
    "1/2 of 3 1/4 and ½, +5 -3 5th #2": "1/2 of 3_1/4 and 1/2 +5 -3 5th # 2",
    "call 555-1234 or (800) 555 1212": "call 555-1234 or -lrb-800-rrb-_555_1212",
    "and/or w/ AT&T, R&B, b&w, C++ &amp; &lt;": "and/or w / at&t r&b b & w c++ & <",
    "see http://a.com/b?c=d. or a@b.org, @me #tag": "see http://a.com/b?c=d or a@b.org, @me #tag",
    "nice 😀 :-) ❤ 👍🏽 ;D <3 ™ 20°C": "nice :--rrb- ❤ ;d < 3 ™ 20 ° c",
    "Café naïve ÉCOLE İ ΟΔΟΣ 日本語。": "café naïve école i\u0307 οδος 日本語 。",
    "rock 'n' roll in the '80s, o'clock y'all ma'am": "rock 'n' roll in the '80s o'clock y' all ma'am",
    "<b>bold</b> a<br/>b": "<b> bold </b> a <br/> b",
    "soft\u00adhyphen and no\u00a0break": "softhyphen and no break",
    "two\nlines\tand  tab ": "two lines and tab",
    "": "",
    " .,;:!? - ": "!?",
}


@pytest.mark.parametrize(("text", "words"), WORDS.items())
def test_words(text, words):
    assert tokenize([text]) == [[word.replace("_", NO_BREAK) for word in words.split()]]


def test_captions_keep_apart():
    assert tokenize(["", "a\r\nb", "", "dog.", ""]) == [[], ["a", "b"], [], ["dog"], []]
    assert tokenize([]) == []
    # A letter and a full stop are one word, unless the next caption says that a sentence has ended: as in coco-caption.
    assert tokenize(["plan B.", "a dog"]) == [["plan", "b."], ["a", "dog"]]
    assert tokenize(["plan B.", "The dog"]) == [["plan", "b"], ["the", "dog"]]


def split(*texts):
    return [text.split() for text in texts]


def test_bleu_by_hand():
    # the once and cat of 4; "the cat" of 3 pairs. Both references are 2 words longer or shorter: the shorter counts.
    found = bleu(split("the the the cat"), [split("a the cat sat on mats", "the cat")])
    assert found[:2] == pytest.approx([2 / 4, math.sqrt(2 / 4 * 1 / 3)], abs=1e-9)
    # Half as long as wanted, and no three words: 1e-15 / 1e-9 of them.
    found = bleu(split("a cat"), [split("a cat sat here")])
    assert found[0] == pytest.approx(math.exp(-1), abs=1e-8)
    assert found[2] == pytest.approx(1e-2 * math.exp(-1), abs=1e-8)


def test_bleu_is_of_all_captions_as_one():
    found = bleu(split("a", "b c d"), [split("a"), split("b x x x x")])
    assert found[0] == pytest.approx(2 / 4 * math.exp(1 - 6 / 4), abs=1e-8)


def test_bleu_of_published_counts():
    """COCO's example of 1,000 images: BLEU .579 .404 .279 .191."""
    made = [9893 - 1000 * n for n in range(4)]
    found = bleu_of_counts([5732, 2510, 1043, 423], made, 9893, 9855)
    assert found == pytest.approx([0.579, 0.404, 0.279, 0.191], abs=5e-4)


def test_rouge_by_hand():
    # P 2/4 and R 2/2 of the first, P 3/4 and R 3/6 of the second: the best of each.
    found = rouge_l(split("a b c d"), [split("a b", "a x c d e f")])
    assert found == [pytest.approx(2.44 * 0.75 / (1 + 1.44 * 0.75))]
    assert rouge_l(split("a b"), [split("c", "d e")]) == [0]
    assert rouge_l(split("", "a", ""), [split("a"), split(""), split("a", "")]) == [0, 0, 1]


def test_common_subsequence_equals_the_plain_table():
    rng = random.Random(0)
    for _ in range(200):
        first, second = (rng.choices("abcd", k=rng.randint(1, 12)) for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, j in itertools.product(range(len(first)), range(len(second))):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if first[i] == second[j] else longer
        assert _common_length(first, second) == table[-1][-1]


def test_cider_by_hand():
    references = [split("a cat"), split("a dog")]
    # "a" is everywhere and weighs nothing. Words and pairs agree, longer runs do not exist: half of 10.
    assert cider_d(split("a cat", "a cat"), references) == pytest.approx([5, 0])
    # "cat" is counted once of 2; one pair of 2 agrees, and both are rare; one pair too many.
    found = cider_d(split("a cat cat", "a dog"), references)
    assert found == pytest.approx([10 / 4 * (1 / 2 + 1 / math.sqrt(2)) * math.exp(-1 / 72), 5])
    # The mean over references.
    assert cider_d(split("a cat", "x"), [split("a cat", "y"), split("a dog")])[0] == pytest.approx(2.5)


def test_of_a_single_image_everything_is_common():
    assert caption_metrics(["a cat"], [["A cat."]]) == {
        "bleu1": pytest.approx(1),
        "bleu2": pytest.approx(1),
        "bleu3": pytest.approx(1e-2),
        "bleu4": pytest.approx(1e-3),
        "rouge_l": pytest.approx(1),
        "cider_d": 0,
    }


def test_empty_captions_have_scores():
    found = caption_metrics(["", "."], [["a cat"], ["", "a dog"]])
    assert found["bleu1"] == pytest.approx(0) and found["cider_d"] == 0
    assert found["rouge_l"] == 0.5  # one empty word of one: coco-caption's, too


def test_tokenized_references_stay_with_their_image():
    assert tokenized(["x", "y"], [["A cat.", "b"], ["c"]]) == (split("x", "y"), [split("a cat", "b"), split("c")])


@pytest.mark.parametrize(
    ("generated", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 generated captions, but references of 2"),
        ([], [], "0 generated captions"),
        (["a", "b"], [["a"], []], "image 1 of 2 has no reference"),
        (["a"], ["a"], "a list of captions for each image"),
    ],
)
def test_refuses_what_does_not_fit(generated, references, message):
    with pytest.raises(ValueError, match=message):
        caption_metrics(generated, references)


def captioned(text, **meta):
    return Captioned(Sample(text, SourceConfig("images"), 0, None, "", "", meta), text, None)


def test_scores_of_captioned_samples(capsys):
    results = [captioned("a cat", captions=["A cat.", " "]), captioned("a dog", captions=["The dog"])]
    found = CaptionEvaluation(None, Options(Path(), show=1), Dealer()).scores(results)
    assert list(found) == ["samples", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider_d"]
    assert found["samples"] == 2 and found["bleu1"] == pytest.approx(3 / 4)
    assert "reference  A cat." in capsys.readouterr().out


def test_texts_without_reference_are_passed_over():
    assert text_scores([]) == text_scores([("a cat", []), ("a dog", [" "])]) == {}
    assert text_scores([("a cat", []), ("a dog", ["a dog"])])["bleu2"] == pytest.approx(1)


def test_what_java_metrics_miss_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "_package", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(DataError, match=r"SPICE needs stanford-corenlp-3\.6\.0\.jar and .*models\.jar in .*lib"):
        java.java_metrics(["a"], [["a"]], "spice")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no `java` on the PATH"):
        java.java_metrics(["a"], [["a"]])
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'dsmoe-vl\[metrics\]'"):
        java.java_metrics(["a"], [["a"]])


@pytest.mark.filterwarnings("ignore:Exception ignored")  # the package closes a pipe that is broken
def test_java_that_dies_is_an_error_not_a_wait(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: METEOR's failure was not checked")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match="METEOR has failed"):
        java.java_metrics(["a"], [["a"]])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("一只狗在草地上。", "一 只 狗 在 草 地 上"),
        ("两只 iPhone15 手机（黑色）", "两 只 iphone15 手 机 黑 色"),
        ("公園で犬が走る、カメラ", "公 園 で 犬 が 走 る カ メ ラ"),
        ("ｶﾒﾗ", "カ メ ラ"),
        ("หมาที่น่ารัก", "ห ม า ที่ น่ า รั ก"),
        ("A dog's ball, 2.5 m", "a dog s ball 2 5 m"),
        ("Ünïcode naïve", "ünïcode naïve"),
        ("  ", ""),
        ("\u0301a", "a"),
    ],
)
def test_characters(caption, words):
    assert split_characters([caption]) == [words.split()]


def test_chinese_captions_are_scored_by_characters():
    generated, references = ["一只狗在草地上", "红色的汽车"], [["一只狗在草地上跑"], ["一辆红色的汽车", "红车"]]
    scores = caption_metrics(generated, references, "characters")
    # All of 7 and 5 characters match; the closest references have 8 and 7.
    assert scores["bleu1"] == pytest.approx(math.exp(1 - 15 / 12), rel=1e-6)
    assert caption_metrics(generated, references)["bleu1"] < 0.1  # a sentence is one word
    assert scores["rouge_l"] > 0.8
    named = text_scores(zip(generated, references, strict=True), "characters")
    assert named == {f"{name}_characters": value for name, value in scores.items()}
    assert named.keys() <= TEXT_LABELS.keys()
