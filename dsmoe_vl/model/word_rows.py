"""First values of rows of the token embedding from the vectors of words. D: model width, w: width of the vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from dsmoe_vl.data.word_start import WordStart
from dsmoe_vl.model.init import EMBEDDING_STD, generator_of

_NAME = "embedding.weight"


@torch.no_grad()
def fill_words(name: str, values: Tensor, start: WordStart | None, seed: int) -> None:
    """Overwrite the rows of `start` in the tensor of that name, [V, D], if it is the token embedding.

    Vectors of w < D values are turned into D by a fixed matrix with orthonormal rows, so lengths and angles stay. Then
    all are scaled together, so that the root mean square of their values is the standard deviation of other first
    values; a word stays longer than another. All follows from seed, vectors and name.
    """
    if start is None or name != _NAME:
        return
    width = values.shape[1]
    vectors = torch.from_numpy(start.vectors).double()
    if start.width < width:
        # In double precision: results of different libraries differ by far less than fp32 resolves.
        noise = torch.empty(width, start.width, dtype=torch.float64)
        basis, upper = torch.linalg.qr(noise.normal_(generator=generator_of(f"{seed}:{name}:words")))
        vectors = vectors @ (basis * upper.diagonal().sign()).T  # libraries choose signs differently
    vectors *= EMBEDDING_STD / vectors.square().mean().sqrt()
    values[list(start.rows)] = vectors.to(values.dtype)
