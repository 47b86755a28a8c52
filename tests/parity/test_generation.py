"""Generation with the key/value cache against whole forwards, and searches against counting everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.generate import UncachedDecoder
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.inference.generate import CachedDecoder, caption_task, generate, prompt_batch, unspeakable
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.token_search import LENGTH_POWER, Search, beam, greedy, nucleus, sample
from dsmoe_vl.moe.router import Router
from dsmoe_vl.tasks.language import followed_by
from dsmoe_vl.tasks.video_summary import VideoSummaryTask
from tests.support import samples
from tests.support.trained import THREE_TASKS, random_run

TOKENS = 12
NO_END = -1
FORMS = {
    "dropless": (),
    "one expert, isolated": ("moe.top_k=1", "moe.routing=isolated"),
    "shared expert, as many key heads": ("moe.shared_ffn_width=32", "model.kv_heads=4"),
    "a model of other makers": (
        "model.head_width=12", "model.qk_norm=width", "model.qkv_bias=true", "model.tied=false",
        "moe.shared_ffn_width=32", "moe.shared_gate=true", "moe.renormalise=false", "model.vision.norm=layer",
        "model.vision.bias=true", "model.vision.ffn=gelu", "model.vision.positions=learned",
        "model.vision.position_grid=5", "model.vision.prefix_tokens=1", "model.vision.layer_scale=true",
        "model.vision.placeholder=replace",
    ),
    "pictures with places of their own, and taps": (
        "model.rope_sections=[2, 1, 1]", "model.vision.taps=[0]", "model.vision.connector_width=24", "model.tied=false",
    ),
    "capacity that would drop": ("moe.backend=capacity", "moe.eval_capacity_factor=0.5", "moe.min_capacity=1"),
    "capacity, residual": ("moe.backend=capacity", "moe.residual=true", "moe.top_k=1", "moe.eval_capacity_factor=0.5"),
}  # fmt: skip


@pytest.fixture(params=FORMS.values(), ids=FORMS, scope="module")
def trained(request, tiny, tmp_path_factory):
    return load_run(random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS, *request.param, seed=7))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    return load_run(random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS))


def prompts_of(trained):
    """Images and videos, captions and a summary: prompts of different lengths, tasks and modalities."""
    task = caption_task(trained)
    summary = VideoSummaryTask(task.reader, task.tokenizer, trained.recipe.tasks.summary)
    prompts = [task.prompt(samples.sample(kind, number=n)) for kind, n in (("image", 0), ("video", 1), ("image", 2))]
    return [*prompts, summary.prompt(samples.sample("video", number=3))]


def naive(trained, prompt, count):
    """One prompt alone: a whole forward a token. Tokens, and their logits [count, V]."""
    tokens, logits, mask = [], [], unspeakable(trained)
    for _ in range(count):
        segment = followed_by(prompt, tokens, 0)
        with torch.inference_mode():
            hidden, _ = trained.model(prompt_batch(trained, [segment]))
            logits.append(trained.model.head(hidden[-1]).masked_fill(mask, float("-inf")))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


class Recorded:
    """A decoder that keeps the logits of every step."""

    def __init__(self, decoder):
        self.decoder, self.logits = decoder, []

    def start(self):
        self.logits.append(self.decoder.start())
        return self.logits[-1]

    def extend(self, tokens):
        self.logits.append(self.decoder.extend(tokens))
        return self.logits[-1]


@torch.inference_mode()
def recorded(make, trained, prompts):
    decoder = Recorded(make(trained, prompts, TOKENS))
    return greedy(decoder, NO_END, TOKENS), torch.stack(decoder.logits, dim=1)


def test_cached_uncached_and_naive_write_the_same(trained):
    prompts = prompts_of(trained)
    cached, logits = recorded(CachedDecoder, trained, prompts)
    uncached, uncached_logits = recorded(UncachedDecoder, trained, prompts)
    torch.testing.assert_close(logits, uncached_logits, rtol=1e-5, atol=1e-5)
    assert cached == uncached
    for row, prompt in enumerate(prompts):
        tokens, alone = naive(trained, prompt, TOKENS)
        torch.testing.assert_close(logits[row], alone, rtol=1e-5, atol=1e-5)
        assert cached[row] == tokens
    assert len({tuple(tokens) for tokens in cached}) == len(prompts)
    assert sum(len(set(tokens)) for tokens in cached) >= 10  # no text that repeats one token


def test_with_dropping_a_prompt_would_be_continued_otherwise_in_company(tiny, tmp_path):
    """Why a run that is loaded for use drops nothing: `load_run` has switched it off."""
    trained = load_run(random_run(tiny, tmp_path / "run", *THREE_TASKS, *FORMS["capacity that would drop"]))
    layer, prompts = trained.model.layers[1].feed_forward, prompts_of(trained)
    assert trained.recipe.moe.drop_tokens and not layer.moe.drop_tokens
    layer.moe = trained.recipe.moe
    together, _ = recorded(UncachedDecoder, trained, prompts)
    assert together != [naive(trained, prompt, TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize("search", [Search(beams=3), Search(top_p=0.95, temperature=3.0)], ids=["beams", "sampled"])
def test_searches_are_the_same_with_and_without_the_cache(trained, search):
    prompts = prompts_of(trained)
    assert generate(trained, prompts, 6, search) == generate(trained, prompts, 6, search, UncachedDecoder)
    alone = [generate(trained, [prompt], 6, search)[0] for prompt in prompts]
    assert generate(trained, prompts, 6, search) == alone


def test_tokens_are_routed_as_in_training(plain):
    """The experts of every token, prompt and text, are those of the training forward over the whole segments."""
    prompts, chosen = prompts_of(plain), []
    routers = [module for module in plain.model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda _m, inputs, out: chosen.append((out.experts, *inputs[1:])))
             for router in routers]  # fmt: skip
    written, _ = recorded(CachedDecoder, plain, prompts)
    steps = [torch.stack([step[i] for step in chosen[1:]], dim=1) for i in range(3)]  # [S, TOKENS - 1, ...]
    (first,), chosen[:] = chosen[:1], []
    lengths = [prompt.length for prompt in prompts]
    of_prompts = [part.split(lengths) for part in first]
    whole = [followed_by(prompt, tokens[:-1], 0) for prompt, tokens in zip(prompts, written, strict=True)]
    with torch.inference_mode():
        plain.model(prompt_batch(plain, whole))
    for hook in hooks:
        hook.remove()
    assert len(routers) == 1 and len(chosen) == 1
    for row, expected in enumerate(zip(*(part.split([s.length for s in whole]) for part in chosen[0]), strict=True)):
        for i, values in enumerate(expected):
            assert torch.cat((of_prompts[i][row], steps[i][row])).equal(values)
    assert set(steps[1].flatten().tolist()) == {task_number("caption"), task_number("summary")}


def test_a_text_ends_and_holds_no_control_symbol(plain, monkeypatch):
    prompts = prompts_of(plain)
    tokens = generate(plain, prompts, TOKENS)
    end = tokens[0][4]
    monkeypatch.setattr(type(plain.tokenizer), "eos", end)
    ended = generate(plain, prompts, TOKENS)
    assert ended == [row[: row.index(end)] if end in row else row for row in tokens]
    silent = set(range(plain.recipe.tokenizer.vocab_size)) - set(plain.tokenizer.spoken)
    with torch.no_grad():
        plain.model.embedding.weight[0] = plain.model.embedding.weight[tokens[0][0]] * 2  # <pad>: now the best
    assert not silent & {t for row in generate(plain, prompts, 4, Search(top_p=1.0, temperature=5.0)) for t in row}


class Table:
    """A language of V tokens whose next token depends on all before, at random; `log_p(prompt, text)`."""

    def __init__(self, prompts, vocabulary, seed=0):
        self.texts = [(prompt, ()) for prompt in range(prompts)]
        self.vocabulary, self.seed = vocabulary, seed

    def logits(self, prompt, text):
        return np.random.default_rng([self.seed, prompt, *text]).normal(size=self.vocabulary) * 2

    def log_p(self, prompt, text):
        logits = self.logits(prompt, text)
        return logits - np.log(np.exp(logits).sum())

    def start(self):
        return torch.tensor(np.stack([self.logits(*text) for text in self.texts]))

    def extend(self, tokens):
        self.texts = [(p, (*text, int(t))) for (p, text), t in zip(self.texts, tokens, strict=True)]
        return self.start()

    def keep(self, rows):
        self.texts = [self.texts[row] for row in rows]


def score(table, prompt, text, ended, end):
    """log P / ((5 + |y|) / 6) ** alpha, |y| with the end."""
    whole = (*text, end) if ended else text
    log_p = sum(table.log_p(prompt, whole[:i])[token] for i, token in enumerate(whole))
    return log_p / ((5 + len(whole)) / 6) ** LENGTH_POWER


@pytest.mark.parametrize("seed", range(6))
def test_many_beams_find_the_best_of_all_texts(seed):
    vocabulary, length, end, prompts = 3, 4, 2, 3
    others = [token for token in range(vocabulary) if token != end]
    found = beam(Table(prompts, vocabulary, seed), end, length, beams=len(others) ** length)
    table = Table(prompts, vocabulary, seed)
    for prompt in range(prompts):
        texts = [(text, True) for n in range(length) for text in itertools.product(others, repeat=n)]
        texts += [(text, False) for text in itertools.product(others, repeat=length)]
        best, _ = max(texts, key=lambda t: score(table, prompt, *t, end))
        assert found[prompt] == list(best)


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_few_beams_against_a_plain_loop(seed, beams):
    vocabulary, length, end, prompts = 5, 7, 0, 3
    found = beam(Table(prompts, vocabulary, seed), end, length, beams)
    table = Table(prompts, vocabulary, seed)
    for prompt in range(prompts):
        live, best = [((), 0.0)], (-math.inf, ())
        for _ in range(length):
            longer = [((*t, v), s + p) for t, s in live for v, p in enumerate(table.log_p(prompt, t))]
            longer = sorted(longer, key=lambda item: -item[1])[: 2 * beams]
            best = max([best, *((score(table, prompt, t[:-1], True, end), t[:-1])
                                for t, _ in longer[:beams] if t[-1] == end)])  # fmt: skip
            live = [item for item in longer if item[0][-1] != end][:beams]
        best = max([best, *((score(table, prompt, t, False, end), t) for t, _ in live)])
        assert found[prompt] == list(best[1])
    if beams == 1:
        assert found == greedy(Table(prompts, vocabulary, seed), end, length)


def test_the_nucleus_of_hand_numbers():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    for top_p, expected in [
        (0.4, [0.0, 1.0, 0.0, 0.0]),
        (0.6, [0, 2 / 3, 0, 1 / 3]),  # 0.5 is not enough
        (0.75, [0, 2 / 3, 0, 1 / 3]),  # exactly enough
        (0.8, [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
        (1.0, [0.1, 0.5, 0.15, 0.25]),
    ]:
        torch.testing.assert_close(nucleus(p, top_p), torch.tensor([expected]))


def test_samples_follow_the_nucleus():
    """Evenly spaced draws through the inverse distribution come as often as the probabilities say."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    count = 9000

    class Fixed(Table):
        def start(self):
            return (2 * logits).expand(count, -1)  # at temperature 2 these are the probabilities above

    draws = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(-1)
    tokens = torch.tensor(sample(Fixed(1, 4), NO_END, 1, 0.8, 2.0, draws)).squeeze(-1)
    expected = torch.tensor([0, 5 / 9, 1.5 / 9, 2.5 / 9]) * count
    torch.testing.assert_close(tokens.bincount(minlength=4).float(), expected, rtol=0, atol=2)
    last = torch.full((count, 1), 1 - 2**-53, dtype=torch.float64)  # the greatest draw still falls inside
    assert {row[0] for row in sample(Fixed(1, 4), NO_END, 1, 0.8, 2.0, last)} == {3}


def test_equal_seeds_give_equal_texts_in_any_company(plain):
    prompts = prompts_of(plain)
    search = Search(top_p=0.9, temperature=2.0, seed=5)
    written = generate(plain, prompts, TOKENS, search)
    assert written == generate(plain, prompts, TOKENS, search)
    assert [generate(plain, [prompt], TOKENS, search)[0] for prompt in reversed(prompts)] == written[::-1]
    assert written != generate(plain, prompts, TOKENS, Search(top_p=0.9, temperature=2.0, seed=6))
    assert [t[:5] for t in written] == [t[:5] for t in generate(plain, prompts, 5, search)]
