"""A plain dual encoder: what an engineer would write in an afternoon to learn picture-text retrieval from nothing.

A residual CNN reads the picture; a bag of words and of character trigrams is the text. Symmetric InfoNCE, AdamW with a
cosine schedule, small affine and colour changes of the pictures. `learning.py` compares the trainer with it.

Shapes: B pairs, S side of a picture in pixels, W width of an embedding.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BUCKETS = 16384  # rows of the table of hashed words and trigrams
_WIDTH = 256
_CHANNELS = (48, 96, 192, 448)  # of the stages, each at half the side of the one before
_RATE, _WARMUP = 1e-3, 50


def features(text: str) -> list[int]:
    """Rows of the table for the words of a text and the trigrams of each word."""
    found: list[str] = []
    for word in text.lower().split():
        padded = f"<{word}>"
        found += [word, *(padded[at : at + 3] for at in range(len(padded) - 2))]
    return [zlib.crc32(feature.encode()) % _BUCKETS for feature in found]


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 or width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.short(x) + self.second_norm(self.second(inner)))


class DualEncoder(nn.Module):
    """Both sides to unit vectors, and the logarithm of the similarities' scale."""

    def __init__(self, picture: nn.Module | None = None) -> None:
        """`picture`: in place of the CNN; it reads what `Pairs` have as pictures, which are not changed then."""
        super().__init__()
        self.reads_pixels = picture is None
        self.picture = self._cnn() if picture is None else picture
        self.words = nn.EmbeddingBag(_BUCKETS, _WIDTH, mode="mean")
        self.text = nn.Sequential(
            nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH)
        )
        nn.init.normal_(self.words.weight, std=0.02)  # rows are seen seldom: small ones move
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @staticmethod
    def _cnn() -> nn.Module:
        first = _CHANNELS[0] // 2
        stem: list[nn.Module] = []
        for width, out in ((3, first), (first, _CHANNELS[0])):
            stem += [nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        widths = (_CHANNELS[0], *_CHANNELS)
        stages = [_Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], _WIDTH))

    def embed_pictures(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """uint8 [B, 3, S, S], or what the part for pictures reads -> [B, W]. `generator`: change pixels at random."""
        if self.reads_pixels:
            pictures = pictures.float() / 127.5 - 1
            pictures = pictures if generator is None else augmented(pictures, generator)
        return F.normalize(self.picture(pictures), dim=-1)

    def embed_texts(self, texts: list[list[int]]) -> Tensor:
        """Features of each text -> [B, W]."""
        flat = torch.tensor([row for text in texts for row in text])
        starts = torch.tensor([0, *np.cumsum([len(text) for text in texts])[:-1]])
        return F.normalize(self.text(self.words(flat, starts)), dim=-1)


@dataclass(frozen=True)
class Pairs:
    """Pictures uint8 [N, 3, S, S] or what stands for them, the texts of each, and the number of what it shows: equal
    ones are no negatives."""

    pictures: Tensor
    texts: list[list[str]]
    content: Tensor


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated up to 10 degrees, scaled by up to 12 %, moved by up to 8 %; brightness and contrast by up to 20 %."""
    count = len(pixels)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * limit

    angle, scale = uniform(math.pi / 18), 1 + uniform(0.12)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    turn = torch.stack((torch.stack((cos, -sin, uniform(0.16)), 1), torch.stack((sin, cos, uniform(0.16)), 1)), 1)
    grid = F.affine_grid(turn, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved * (1 + uniform(0.2)).view(-1, 1, 1, 1) + uniform(0.2).view(-1, 1, 1, 1)


def feature_reader(width: int) -> nn.Module:
    """A small network over features [B, width] of a frozen encoder."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))


def train(
    pairs: Pairs, steps: int, batch: int, seed: int, every: int, picture: Callable[[], nn.Module | None] = lambda: None
) -> Iterator[tuple[DualEncoder, int, float]]:
    """After every `every` steps: the model in evaluation mode, pairs seen, and the CPU seconds of training so far."""
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    model = DualEncoder(picture())
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.05, fused=True)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)
    )
    order: list[int] = []
    seconds, started = 0.0, time.process_time()
    for step in range(1, steps + 1):
        if len(order) < batch:
            order += rng.permutation(len(pairs.texts)).tolist()
        rows, order = order[:batch], order[batch:]
        texts = [pairs.texts[row][rng.integers(len(pairs.texts[row]))] for row in rows]
        media, text = (
            model.embed_pictures(pairs.pictures[rows], generator),
            model.embed_texts([features(text) for text in texts]),
        )
        content = pairs.content[rows]
        same = (content[:, None] == content) & ~torch.eye(batch, dtype=torch.bool)
        logits = (model.log_scale.exp().clamp(max=100) * media @ text.t()).masked_fill(same, float("-inf"))
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            seconds += time.process_time() - started
            yield model.eval(), step * batch, seconds
            model.train()
            started = time.process_time()
