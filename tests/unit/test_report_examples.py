"""What a report shows of an evaluation: the choice of examples, retrieval's candidates, and the experts' load."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.errors import DataError
from dsmoe_vl.evaluation.captions import CaptionChoice, Captioned, caption_samples
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Chosen, Counts, thumbnail
from dsmoe_vl.evaluation.expert_load import LoadCounter, total_load
from dsmoe_vl.evaluation.retrieval import evaluate_retrieval
from dsmoe_vl.evaluation.retrieval_examples import TOP, Gallery, retrieval_examples
from dsmoe_vl.evaluation.storyboards import storyboard
from dsmoe_vl.evaluation.summaries import summarize_samples
from dsmoe_vl.inference.generate import caption_task, prompt_batch
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.report.content import ExpertLoad
from dsmoe_vl.tasks.retrieval import pair_id
from tests.support.samples import sample
from tests.support.trained import THREE_TASKS, random_run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    pyramid = ("model.layers=3", "moe.experts_per_layer=[2, 4]")
    return load_run(random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS, *pyramid))


class Ranks(Dealer):
    """A dealer that hears of the other ranks what they would say."""

    def __init__(self, others):
        super().__init__()
        self.others = list(others)

    def gather(self, value):
        return [value, *(other.entries for other in self.others)]


def chosen(names, count=5, seed=0):
    kept = Chosen(count, seed)
    for name in names:
        kept.offer(name, lambda name=name: name.upper())
    return kept


def test_choice_depends_neither_on_order_nor_on_ranks():
    names = [f"n{i}" for i in range(200)]
    wanted = chosen(names).merged(Dealer())
    assert len(wanted) == 5 and wanted == sorted(wanted) and set(wanted) <= {name.upper() for name in names}
    assert chosen(reversed(names)).merged(Dealer()) == wanted
    parts = [chosen(names[rank::3]) for rank in range(3)]
    assert parts[0].merged(Ranks(parts[1:])) == wanted
    assert chosen(names, seed=1).merged(Dealer()) != wanted
    assert chosen(names[:3]).merged(Dealer()) == ["N0", "N1", "N2"] and chosen(names, 0).merged(Dealer()) == []


def test_what_is_not_chosen_is_not_made():
    made = []
    kept = Chosen(4, 0)
    for i in range(1000):
        kept.offer(f"n{i}", lambda i=i: made.append(i))
    assert 4 <= len(made) < 100  # 4 (1 + log(1000 / 4)) = 26 on average

    def unreadable():
        raise DataError("no picture")

    kept = Chosen(4, 0)
    kept.offer("a", unreadable)
    assert kept.merged(Dealer()) == []


def test_fewer_examples_of_many_folders():
    assert Counts.of(0) == Counts.of(2) == Counts.of(6) == Counts(8, 4, 4, 3)
    assert Counts.of(12) == Counts(4, 2, 2, 1) and Counts.of(1000) == Counts(1, 1, 1, 1)


def gallery_of(samples, texts_of_each, seed=0, width=8):
    """Random unit vectors for samples with a given number of texts each."""
    rng = np.random.default_rng(seed)
    of_text = np.repeat(np.arange(len(samples)), texts_of_each)
    media, text = (rng.standard_normal((count, width)) for count in (len(samples), len(of_text)))
    media, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (media, text))
    return Gallery(media, text, of_text, [pair_id(one) for one in samples], [f"text {i}" for i in range(len(of_text))])


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_examples_against_loops(seed):
    samples = [sample("image", number=number, meta={"content": f"c{number}"}) for number in range(12)]
    counts = np.random.default_rng(seed).integers(1, 4, 12)
    gallery = gallery_of(samples, counts, seed)
    examples = retrieval_examples(gallery, iter(samples), queries=3, seed=seed)
    assert [example.direction for example in examples] == ["text_to_media"] * 3 + ["media_to_text"] * 3
    for asked, told in zip(examples[:3], examples[3:], strict=True):
        query = int(asked.text.split()[1])
        row = int(gallery.media_of_text[query])
        assert query == min(np.flatnonzero(gallery.media_of_text == row))  # the same media in both directions
        for example, scores, right in (
            (asked, [float(m @ gallery.text[query]) for m in gallery.media], {row}),
            (
                told,
                [float(t @ gallery.media[row]) for t in gallery.text],
                set(np.flatnonzero(gallery.media_of_text == row)),
            ),
        ):
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            assert [found.score for found in example.found] == pytest.approx([scores[i] for i in order[:TOP]])
            assert [found.right for found in example.found] == [i in right for i in order[:TOP]]
            best = next(i for i in order if i in right)
            assert example.place == 1 + sum(i not in right for i in order[: order.index(best)])
            assert example.right.score == pytest.approx(scores[best]) and example.gallery == len(scores)
        assert [found.text for found in told.found] == [gallery.texts[i] for i in order[:TOP]]
        assert told.picture == thumbnail(np.asarray(Image.open(io.BytesIO(samples[row].media))), 192)
        assert all(found.picture is not None for found in asked.found)


def test_a_constant_encoder_finds_last():
    samples = [sample("image", number=number, meta={"content": f"c{number}"}) for number in range(4)]
    same = np.ones((4, 1))
    gallery = Gallery(same, same, np.arange(4), [pair_id(one) for one in samples], list("abcd"))
    assert [example.place for example in retrieval_examples(gallery, [], queries=4)] == [4] * 8
    assert retrieval_examples(gallery_of([], 0), [], queries=4) == []


def test_pictures_are_those_of_the_gallery():
    """The first of a content that can be read and has a caption; without one there is no picture."""
    meta = {"content": "c", "captions": ["a"]}
    silent, broken = (sample("image", number=0, meta=meta, **change) for change in ({"text": ""}, {"media": b"no"}))
    silent = dataclasses.replace(silent, meta={"content": "c"})
    good, late = (sample("image", number=number, meta=meta) for number in (1, 2))
    gallery = gallery_of([good], 1)
    (_, told) = retrieval_examples(gallery, [silent, broken, good, late], queries=1)
    assert told.picture == thumbnail(np.asarray(Image.open(io.BytesIO(good.media))), 192)
    (asked, told) = retrieval_examples(gallery, [silent, broken], queries=1)
    assert told.picture is None and asked.found[0].picture is None


def test_captions_and_wrong_ones():
    choice = CaptionChoice(Counts(captions=3, wrong=2))
    results = [
        Captioned(
            sample("image", number=number, meta={"captions": ["a", " ", "b"]}), f"generated {number}", number % 2 > 0
        )
        for number in range(20)
    ]
    assert list(choice.watch(results)) == results
    examples = choice.merged(Dealer())
    assert (len(examples.random), len(examples.wrong)) == (3, 2)
    assert all(example.correct is False for example in examples.wrong)
    shown = [*examples.random, *examples.wrong]
    assert len({example.key for example in shown}) == 5
    for example in shown:
        number = int(example.key.split("-")[1])
        assert example.generated == f"generated {number}" and example.references == ["a", "b"]
        (picture,) = example.pictures
        assert Image.open(io.BytesIO(picture.jpeg)).size == (picture.width, picture.height)
    assert CaptionChoice(Counts()).merged(Dealer()) is None


def test_storyboard_of_a_video(trained):
    data = dataclasses.replace(trained.recipe.data, video_frames=15)
    trained = dataclasses.replace(trained, recipe=dataclasses.replace(trained.recipe, data=data))
    given = sample("video", number=1)
    (result,) = summarize_samples(trained, iter([given]), 4)
    board = storyboard(result.sample, result.summary, result.scores, data)
    frames = len(board.seconds)
    assert frames == len(board.importance) > 12
    assert len(board.frames) == 12 and set(board.key_frames) <= board.frames.keys() <= set(range(frames))
    assert board.key_frames == result.summary.key_frames() and board.generated == result.summary.text
    assert board.annotators == 1 and board.duration_seconds == given.meta["duration_seconds"]
    assert board.annotated.tolist() == pytest.approx(given.meta["importance"])
    assert board.reference == given.meta["summary"] and board.scores == result.scores


def test_load_is_the_sum_of_all_statistics(trained):
    task = caption_task(trained)
    prompts = [task.prompt(sample(kind, number=number)) for kind, number in (("image", 0), ("video", 1))]
    counter = LoadCounter(trained.recipe)
    with counter.watching(trained.model.layers), torch.inference_mode():
        stats = [trained.model(prompt_batch(trained, [prompt]))[1] for prompt in prompts]
        # Padding counts nowhere.
        shape = PackShape(256, 256, 8, 2)
        stats.append(trained.model(collate([assemble(prompts[:1], shape)]))[1])
    load = counter.load()
    assert load.layers == [1, 2] and load.experts == [2, 4]
    assert np.array_equal(load.load, sum(one.load.double().numpy() for one in stats))
    tokens = 2 * prompts[0].length + prompts[1].length
    assert load.load.sum((1, 2, 3)).tolist() == [2 * tokens] * 2  # top 2
    with torch.inference_mode():
        trained.model(prompt_batch(trained, prompts))
    assert np.array_equal(counter.load().load, load.load)  # nobody is watching any more


def test_generated_tokens_count_and_results_stay(trained):
    given = [sample("image", number=number) for number in range(3)]
    counter = LoadCounter(trained.recipe)
    with counter.watching(trained.model.layers):
        watched = [result.generated for result in caption_samples(trained, iter(given), 6)]
    assert watched == [result.generated for result in caption_samples(trained, iter(given), 6)]
    prompts = sum(caption_task(trained).prompt(one).length for one in given)
    assert counter.load().load[0].sum() > 2 * prompts


def test_loads_of_ranks():
    part = ExpertLoad(np.ones((1, 3, 3, 4)), [1], [4])
    assert total_load([None, None]) is None
    assert total_load([part, None, part]).load.tolist() == (2 * part.load).tolist()


def test_retrieval_of_a_model(trained):
    """What is kept of an evaluation is what its metrics are made of."""
    given = [sample("image", number=number) for number in range(8)]
    examples = []

    def keep(gallery):
        examples.extend(retrieval_examples(gallery, given, queries=8))

    scores = evaluate_retrieval(trained, iter(given), 8, keep=keep)
    assert len(examples) == 2 * scores["samples"]
    found = [example.place == 1 for example in examples if example.direction == "media_to_text"]
    assert sum(found) / len(found) == scores["media_to_text_r1"]
