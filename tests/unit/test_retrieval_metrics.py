"""Recall and median rank against a count in plain loops, with exact ties."""

import math
import statistics

import numpy as np
import pytest

from dsmoe_vl.metrics import retrieval as module
from dsmoe_vl.metrics.retrieval import coco_metrics, retrieval_metrics


def oracle(media, text, media_of_text):
    """Ranks one pair at a time. Exact comparisons: the test's vectors have exact products."""
    score = [[sum(float(a) * float(b) for a, b in zip(v, t, strict=True)) for t in text] for v in media]
    media_ranks, text_ranks = [], []
    for i in range(len(media)):
        best = max(score[i][j] for j in range(len(text)) if media_of_text[j] == i)
        media_ranks.append(1 + sum(score[i][j] >= best for j in range(len(text)) if media_of_text[j] != i))
    for j, own in enumerate(media_of_text):
        text_ranks.append(1 + sum(score[i][j] >= score[own][j] for i in range(len(media)) if i != own))
    found = {}
    for direction, ranks in (("media_to_text", media_ranks), ("text_to_media", text_ranks)):
        for k in (1, 5, 10):
            found[f"{direction}_r{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
        found[f"{direction}_median_rank"] = math.floor(statistics.median(ranks))
    return found


def draw(seed, n, m, width=16):
    """Unit vectors of equal magnitudes and random signs: multiples of 1/16 as products, so many exact ties."""
    rng = np.random.default_rng(seed)
    media = rng.choice([-0.25, 0.25], (n, width)).astype(np.float32)
    media_of_text = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, m - n)]))
    flipped = rng.random((m, width)) < 0.2
    return media, np.where(flipped, -media[media_of_text], media[media_of_text]), media_of_text


@pytest.mark.parametrize(("seed", "n", "m"), [(0, 1, 1), (1, 1, 4), (2, 7, 7), (3, 20, 53), (4, 33, 90)])
def test_equals_plain_loops(seed, n, m):
    given = draw(seed, n, m)
    assert retrieval_metrics(*given) == pytest.approx(oracle(*given), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 40, 1000])
def test_chunks_change_nothing(monkeypatch, chunk):
    given = draw(5, 40, 110)
    whole = retrieval_metrics(*given)
    monkeypatch.setattr(module, "_CHUNK_MEDIA", chunk)
    assert retrieval_metrics(*given) == whole
    assert 0 < whole["media_to_text_r1"] < 1


def test_by_hand():
    media = np.eye(3)
    text = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0.8, 0.6], [0, 0.6, 0.8]])
    # Medium 0 finds text 0. Medium 1 has .6 (text 1) and .8 (text 2), and no other text reaches .8. Medium 2 has .8
    # (text 3), which text 1 also has: rank 2. Texts 0, 2 and 3 find their medium, text 1 is closer to medium 2.
    found = retrieval_metrics(media, text, np.array([0, 1, 1, 2]))
    assert found == {
        "media_to_text_r1": pytest.approx(2 / 3),
        "media_to_text_r5": 1.0,
        "media_to_text_r10": 1.0,
        "media_to_text_median_rank": 1.0,
        "text_to_media_r1": 0.75,
        "text_to_media_r5": 1.0,
        "text_to_media_r10": 1.0,
        "text_to_media_median_rank": 1.0,
    }


def test_the_median_of_an_even_number_is_rounded_down():
    media = np.eye(2)
    text = np.array([[1.0, 0.0], [1.0, 0.0]])  # text ranks 1 and 2
    assert retrieval_metrics(media, text, np.array([0, 1]))["text_to_media_median_rank"] == 1.0


def collapsed(noise):
    """Everything the same vector, but for noise below float32's precision; its products are not exact."""
    rng = np.random.default_rng(6)
    vector = rng.normal(size=257)
    vector /= np.linalg.norm(vector)
    media, text = (vector + noise * rng.normal(size=(rows, 257)) for rows in (301, 602))
    return media.astype(np.float32), text.astype(np.float32)


@pytest.mark.filterwarnings("ignore:invalid value")  # the NaNs
@pytest.mark.parametrize("vectors", [collapsed(0), collapsed(1e-9), (np.full((301, 8), np.nan), np.ones((602, 8)))])
def test_constant_and_broken_embeddings_are_last(vectors):
    found = retrieval_metrics(*vectors, np.arange(602) % 301)
    assert {found[f"{way}_r{k}"] for way in ("media_to_text", "text_to_media") for k in (1, 5, 10)} == {0.0}
    assert found["media_to_text_median_rank"] == 602 - 2 + 1
    assert found["text_to_media_median_rank"] == 301


@pytest.mark.parametrize("media_of_text", [[0, 0, 0], [0, 1, 2], [0, 1], []])
def test_refuses_what_does_not_fit(media_of_text):
    with pytest.raises(ValueError, match="media_of_text must give"):
        retrieval_metrics(np.eye(2), np.ones((3, 2)), np.array(media_of_text, dtype=np.int64))


def coco_oracle(media, text, media_of_text, size):
    """Each fold's media one after another, with the first five texts of each."""
    folds = []
    for start in range(0, size * 5, size):
        rows, own = [], []
        for i in range(start, start + size):
            mine = [j for j in range(len(text)) if media_of_text[j] == i][:5]
            rows += mine
            own += [i - start] * len(mine)
        folds.append(oracle(media[start : start + size], text[rows], own))
    return {name: statistics.mean(fold[name] for fold in folds) for name in folds[0]}


@pytest.mark.parametrize(("seed", "n", "m"), [(0, 20, 100), (1, 20, 170), (2, 23, 150), (3, 20, 20)])
def test_coco_folds_equal_plain_loops(seed, n, m):
    given = draw(seed, n, m)
    found = coco_metrics(*given, media_in_all=20)
    expected = coco_oracle(*given, size=4)
    assert {name: found[f"coco_1k_{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)
    first = [j for j in range(m) if given[2][j] < 20 and list(given[2][:j]).count(given[2][j]) < 5]
    whole = oracle(given[0][:20], given[1][first], given[2][first])
    assert {name: found[f"coco_5k_{name}"] for name in whole} == pytest.approx(whole, abs=1e-12)
    assert set(found) == {f"coco_{part}_{name}" for name in expected for part in ("1k", "5k")}


def test_folds_are_consecutive_and_compete_with_nobody_outside():
    """The first and the last look alike: each confuses the other's text in the whole, not in its fold of one."""
    media = np.eye(5)[[0, 1, 2, 3, 0]]
    found = coco_metrics(media, media, np.arange(5), media_in_all=5)
    assert found["coco_1k_media_to_text_r1"] == found["coco_1k_text_to_media_r1"] == 1.0
    assert found["coco_5k_media_to_text_r1"] == found["coco_5k_text_to_media_r1"] == 3 / 5


def test_fewer_media_are_no_coco():
    assert coco_metrics(np.eye(4), np.eye(4), np.arange(4)) == {}
