"""Shared memory through which worker processes hand the patches of their packs to the rank.

Patches are nearly all of a pack's bytes. Through the pipe of a DataLoader they are copied six times, half of that by
the rank while it would launch kernels; here a worker copies them once, and `collate` reads them where they are.
"""

from __future__ import annotations

import ctypes
import multiprocessing

import numpy as np

from dsmoe_vl.data.pack import PackShape
from dsmoe_vl.data.segment import Pack


class PatchSlots:
    """A ring of slots for each worker: its pack number i lies in slot i % their count.

    A slot needs no lock, nor a message when the rank is done with it. A DataLoader asks a worker for a further pack
    only when the rank takes one, so with as many slots as packs that a worker may be ahead and the rank may hold, none
    is overwritten too early. Can be passed to worker processes, however they are started.
    """

    def __init__(self, workers: int, ahead: int, held: int, shape: PackShape) -> None:
        """`ahead`: packs of a worker that were asked for and not taken yet; `held`: those that the rank still reads."""
        self._count = ahead + held
        self._shape = (workers, self._count, shape.patches, 3 * shape.patch_size**2)
        self._cell = shape.merge**2
        self._bytes = multiprocessing.RawArray(ctypes.c_uint8, int(np.prod(self._shape)))
        self._numbers = multiprocessing.RawArray(ctypes.c_int64, workers * self._count)

    def store(self, pack: Pack, worker: int, number: int) -> None:
        """Move the patches of a worker's pack `number` into its slot; the pack keeps none."""
        used = max(sum(pack.picture_lengths), self._cell)  # `collate` may read an empty cell
        slot = number % self._count
        self._numbers[worker * self._count + slot] = number
        self._view()[worker, slot, :used] = pack.patches[:used]
        pack.patches = pack.patches[:0]

    def restore(self, pack: Pack, worker: int, number: int) -> None:
        """Give a pack that has arrived its patches, until `held` further ones of its worker have been taken."""
        pack.patches = self._view()[worker, number % self._count]

    def check(self, worker: int, number: int) -> None:
        """To be called when a pack's patches have been read: they were its own all the time."""
        found = self._numbers[worker * self._count + number % self._count]
        assert found == number, f"pack {number} of worker {worker} was overwritten by its pack {found}"

    def _view(self) -> np.ndarray:
        return np.ctypeslib.as_array(self._bytes).reshape(self._shape)
