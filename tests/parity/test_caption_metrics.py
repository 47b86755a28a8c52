"""Words and caption metrics against pycocoevalcap, the packaged coco-caption: real captions, a novel, random strings.

Its tokenizer and METEOR run in Java; BLEU, ROUGE-L and CIDEr-D are Python.
"""

import json
import random
import re
import shutil
from itertools import pairwise

import pytest

from dsmoe_vl.metrics.captions import caption_metrics, cider_d, rouge_l, tokenized
from dsmoe_vl.metrics.meteor_spice import java_metrics
from dsmoe_vl.metrics.ptb_tokenizer import tokenize
from tests.unit.test_caption_metrics import WORDS

pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap (the extra `metrics`): parity was not checked")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java: tokenizer and METEOR were not checked")

# Strings are made of the parts of one family, with and without spaces between them.
FAMILIES = """
a b A I dog The the U.S. u.s. Mr. st No. no. etc. e.g. Inc. p.m. Ph.D. Jr K. can't isn't don't cannot gonna it's he'll
I'm dog's dogs' 'em 'n' 'til 'twas o'clock ma'am y'all t-shirt x-ray and/or w/ 1 12 1990 1,000 3.5 .5 1/2 12:30 5th 80s
'80s $5 $ % #1 #dog @dog a@b.com www.a.com http://a.b/c foo.jpg ½ £ € ¢ é café É ß 中 日本 😀 ❤ ™ ° × – — … ’ ‘ “ ” "
' '' ` `` . .. ... .... , ; : ! ? !! ?! - -- --- ( ) [ ] { } < > / \\ | & &amp; &lt; + = * _ ~ ^ :) ;-) =D <3 <b> -LRB-
555-1234 (800) 800.555.1212 AT&T C++ a_b \u00a0 \u2009 \u0301 \u00ad

a b c d D I L l m n N o s t T S v ' ' ' . . , , - - / / ! ? 1 2 3 4 5 : ; & ( ) < > " ` ’ @ # $ % * + = _

a b 1 é ’ ‘ “ ” – — … ½ £ € ¢ 中 😀 ❤ ² \u00a0 \u2009 \u0301 \u00ad ' . - / , & n ’ t s $

' ' ' ’ ‘ ` &apos; n t s d m ll re ve em til tis cause 80s 12 o d l j y a e I S ma ol . , - 1 é

1 22 333 4444 55555 - - . , : / ( ) + ++ $ # a ' ½ \u00a0 ² _ – ٣ no. No.

Mr st Inc co No no fig Ark ark pa etc Jr Ph.D u.s. K I vs Mfg The the They A 5 <b> b , ; - 's é . . . . . . . .

http:// https:// www. a bc D1 . .com .org .jpg / ? = & # - _ ~ , ' " ( ) @ é < > ! : % ”

< </ > /> <!-- --> a b = "x" 'y' : ; = - o * ' ( ) D P d { @ | [ ] ^ _ . x
"""
STRINGS = 1500  # of each family


def random_strings():
    rng = random.Random(0)
    for family in FAMILIES.strip("\n").split("\n\n"):
        parts = re.split("[ \n]", family)
        for _ in range(STRINGS):
            yield "".join(rng.choice(parts) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))


def coco_words(captions):
    """By coco-caption, all in one run of Java: strings of words."""
    found = PTBTokenizer().tokenize(dict(enumerate([{"caption": text}] for text in captions)))
    return [found[number][0] for number in range(len(captions))]


def assert_same_words(captions):
    # A caption that ends in an empty line would be missing at the end of a file.
    captions = [*captions, "the end"]
    words = [" ".join(words) for words in tokenize(captions)]
    wrong = [found for found in zip(captions, words, coco_words(captions), strict=True) if found[1] != found[2]]
    assert not wrong, (len(wrong), wrong[:5])


def coco_scores(sentences, truths):
    """BLEU-1 to 4, then ROUGE-L and CIDEr-D with their values of single captions."""
    found = {image: [" ".join(words)] for image, words in enumerate(sentences)}
    truth = {image: [" ".join(words) for words in own] for image, own in enumerate(truths)}
    bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
    return bleu, Rouge().compute_score(truth, found), Cider().compute_score(truth, found)


def assert_same_scores(generated, references):
    sentences, truths = tokenized(generated, references)
    bleu, (rouge, rouges), (cider, ciders) = coco_scores(sentences, truths)
    found = caption_metrics(generated, references)
    assert [found[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(bleu, abs=1e-12)
    assert (found["rouge_l"], found["cider_d"]) == pytest.approx((rouge, cider), abs=1e-12)
    assert rouge_l(sentences, truths) == pytest.approx(rouges, abs=1e-12)
    assert cider_d(sentences, truths) == pytest.approx(ciders, abs=1e-9)
    return found


@pytest.fixture(scope="module")
def coco(shared_data):
    """The captions of each image."""
    images = {}
    for name in ("coco_text_only/annotations/captions_val2017.json", "coco_cc_by/annotations/captions_train2017.json"):
        for row in json.loads((shared_data / name).read_text(encoding="utf-8"))["annotations"]:
            images.setdefault(row["image_id"], []).append(row["caption"])
    return list(images.values())


@needs_java
def test_words_by_hand():
    assert_same_words(WORDS)


@needs_java
def test_words_of_random_strings():
    captions = list(random_strings())
    assert len(set(captions)) > 0.9 * len(captions)
    assert_same_words(captions)


@needs_java
def test_words_of_real_captions(coco):
    captions = [text for own in coco for text in own]
    assert len(captions) > 20_000
    assert_same_words(captions)


@needs_java
def test_words_of_a_novel(shared_data):
    lines = (shared_data / "text" / "botchan.txt").read_text(encoding="utf-8-sig").splitlines()
    assert len(lines) > 4000
    assert_same_words(lines)


def test_scores_of_real_captions(coco):
    """One human caption against the others."""
    chosen = [own for own in coco if len(own) > 1][:1000]
    found = assert_same_scores([own[0] for own in chosen], [own[1:] for own in chosen])
    assert found["bleu1"] > 0.5 and found["cider_d"] > 0.5


@pytest.mark.parametrize("seed", range(20))
def test_scores_of_random_words(seed):
    """Few words, so that much agrees; empty and short captions, other numbers of references, words with spaces."""
    rng = random.Random(seed)
    vocabulary = ["a", "b", "c", "dog", "can't", "3 1/4", "!!", "naïve", "Mr.", "."]

    def caption():
        return " ".join(rng.choices(vocabulary, k=rng.choice([0, 1, 2, 3, 5, 8, 13])))

    references = [[caption() for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 30))]
    assert_same_scores([caption() for _ in references], references)


def test_scores_of_random_strings():
    captions = list(random_strings())[::5]
    references = [[text[: len(text) // 2], text[1:], other] for text, other in pairwise(captions)]
    assert_same_scores(captions[:-1], references)


@needs_java
def test_meteor():
    """What the package's `Meteor` gives for the words of these. Starting it twice takes longer than all the rest."""
    generated = ["A man can't ride a horse on the beach.", "Two dogs playing with a red ball"]
    references = [
        ["A person is riding a horse by the sea.", "man on horse"],
        ["Dogs play with the ball.", "A red ball"],
    ]
    assert java_metrics(generated, references) == {"meteor": pytest.approx(0.35535758770190273, abs=1e-12)}
