"""Greedy decoding, nucleus sampling and beam search, one token per step for all prompts together.

Shapes: S prompts, V vocabulary, B beams. A decoder returns the logits of the next token of each of its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsmoe_vl.errors import ConfigError

LENGTH_POWER = 0.6  # alpha of the length penalty, as in Vaswani et al. 2017, section 6.1


@dataclass(frozen=True)
class Search:
    """Decoding settings. Raises ConfigError for settings that exclude each other or are out of range.

    beams: 1 is greedy decoding; more search for the text with the best `length_normalised` score.
    top_p: tokens are sampled from the nucleus; None does not sample. `temperature` divides the logits first; the same
    `seed` and prompt give the same text, whatever else is in the batch.
    """

    beams: int = 1
    top_p: float | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams}: must be at least 1")
        if self.top_p is None:
            if self.temperature != 1.0 or self.seed:
                raise ConfigError("temperature and seed are for sampling: give top_p too (1 samples from all tokens)")
            return
        if self.beams > 1:
            raise ConfigError(f"beams = {self.beams} and top_p = {self.top_p:g} exclude each other: give one of them")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p:g}: must be above 0 and at most 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature = {self.temperature:g}: must be above 0")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: must be at least 0")


GREEDY = Search()


class Decoder(Protocol):
    """Sequences that can be continued."""

    def start(self) -> Tensor:
        """Logits [S, V] after the prompts; called first."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Append one token to each sequence, int64 [S], and return the logits after it."""

    def keep(self, rows: Tensor) -> None:
        """Continue with the sequences `rows`, int64 [S']; one may occur several times."""


def greedy(decoder: Decoder, end: int, max_tokens: int) -> list[list[int]]:
    """The most probable token of every step, until `end` (not returned) or `max_tokens`."""
    return _one_each(decoder, end, max_tokens, lambda logits, _: logits.argmax(-1))


def sample(
    decoder: Decoder, end: int, max_tokens: int, top_p: float, temperature: float, draws: Tensor
) -> list[list[int]]:
    """Tokens sampled from `nucleus` until `end` (not returned). draws: float64 [S, max_tokens], uniform in [0, 1)."""

    def choose(logits: Tensor, step: int) -> Tensor:
        mass = nucleus((logits.float() / temperature).softmax(-1), top_p).double().cumsum(-1)
        total = mass[:, -1:]
        wanted = torch.minimum(draws[:, step : step + 1] * total, total.nextafter(torch.zeros_like(total)))
        return torch.searchsorted(mass, wanted, right=True).squeeze(-1)

    return _one_each(decoder, end, max_tokens, choose)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of the most probable tokens whose probabilities sum to at least `top_p`, rescaled to sum 1
    (Holtzman et al. 2020, section 3.1, eq. 2 and 3). float32 [S, V] -> [S, V], zero outside of the set."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    inside = torch.where(before < top_p, ordered, 0)
    inside[:, 0] = ordered[:, 0]  # always keep the most probable token, despite rounding
    return torch.zeros_like(probabilities).scatter(-1, tokens, inside / inside.sum(-1, keepdim=True))


def length_normalised(log_probability: Tensor, length: int) -> Tensor:
    """`log P(y) / lp(y)` with `lp(y) = ((5 + |y|) / 6) ** alpha` (Wu et al. 2016, section 7, eq. 14, without coverage).

    |y| counts the end token. Without this division, long texts lose, because every token lowers log P.
    """
    return log_probability / ((5 + length) / 6) ** LENGTH_POWER


def beam(decoder: Decoder, end: int, max_tokens: int, beams: int) -> list[list[int]]:
    """Beam search for the text with the best `length_normalised` score, returned without `end`.

    Each step takes the 2 B most probable continuations of a prompt's B beams. The best B that do not end are the next
    beams; those that end among the first B are candidates. Beams of `max_tokens` tokens are candidates too. A prompt is
    finished when no beam can beat its best candidate.
    """
    logits = decoder.start()
    prompts, device = len(logits), logits.device
    decoder.keep(torch.arange(prompts, device=device).repeat_interleave(beams))
    log_p = logits.float().log_softmax(-1).repeat_interleave(beams, dim=0)
    # log P of each beam; at first only the empty one.
    scores = torch.full((prompts, beams), float("-inf"), device=device)
    scores[:, 0] = 0
    texts = torch.zeros(prompts, beams, 0, dtype=torch.int64, device=device)
    best_score = torch.full((prompts,), float("-inf"), device=device)
    best: list[list[int]] = [[] for _ in range(prompts)]
    for length in range(1, max_tokens + 1):
        vocabulary = log_p.shape[-1]
        continued = (scores.unsqueeze(-1) + log_p.view(prompts, beams, -1)).flatten(1)
        found, places = continued.topk(min(2 * beams, continued.shape[1]), dim=-1)
        tokens = places % vocabulary
        ends = tokens == end
        candidates = length_normalised(found[:, :beams], length).masked_fill(~ends[:, :beams], float("-inf"))
        _improve(best, best_score, candidates, texts, places[:, :beams] // vocabulary)
        # At most B of the 2 B end, one per beam: B others are left.
        going_on = found.masked_fill(ends, float("-inf"))
        scores, order = going_on.topk(beams, dim=-1)
        parents = (places // vocabulary).gather(1, order)
        tokens = tokens.gather(1, order)
        texts = torch.cat((texts.gather(1, parents.unsqueeze(-1).expand(-1, -1, length - 1)), tokens.unsqueeze(-1)), -1)
        if length == max_tokens:
            own = torch.arange(beams, device=device).expand(prompts, -1)
            _improve(best, best_score, length_normalised(scores, length), texts, own)
            break
        # log P of a beam only falls, and its divisor is largest at max_tokens: an upper bound.
        if bool((length_normalised(scores[:, 0], max_tokens) <= best_score).all()):
            break
        first = torch.arange(prompts, device=device).unsqueeze(-1) * beams
        decoder.keep((first + parents).flatten())
        log_p = decoder.extend(tokens.flatten()).float().log_softmax(-1)
    return best


def _improve(best: list[list[int]], best_score: Tensor, candidates: Tensor, texts: Tensor, rows: Tensor) -> None:
    """Replace the best texts by better candidates: scores [S, B] of the texts [S, B', n] at `rows` [S, B]."""
    score, which = candidates.max(dim=-1)
    for prompt in (score > best_score).nonzero().squeeze(-1).tolist():
        best[prompt] = texts[prompt, rows[prompt, which[prompt]]].tolist()
        best_score[prompt] = score[prompt]


def _one_each(decoder: Decoder, end: int, max_tokens: int, choose: Callable[[Tensor, int], Tensor]) -> list[list[int]]:
    """One token per step for each prompt; `choose(logits [S, V], step) -> int64 [S]`."""
    tokens = choose(decoder.start(), 0)
    written, finished = [tokens], tokens == end
    while len(written) < max_tokens and not bool(finished.all()):
        tokens = choose(decoder.extend(tokens), len(written))
        finished = finished | (tokens == end)
        written.append(tokens)
    rows: list[list[int]] = torch.stack(written, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
