"""Shared memory for the patches of packs, written by worker processes and read by the rank.

Patches are nearly all bytes of a pack. The pipe of a DataLoader copies them six times, three of them in the rank, which
should launch kernels. Here a worker copies them once, and `collate` reads them in place.
"""

from __future__ import annotations

import errno
import math
import os
import weakref
from multiprocessing.heap import Arena

import numpy as np

from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.segment import Pack
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import has_file_limit, sharing


class PatchSlots:
    """A ring buffer of slots for each worker: pack number i is in slot i % slots.

    Slots need no locks. A DataLoader asks a worker for another pack only when the rank takes one. So a slot is not
    overwritten too early if a worker has as many slots as packs that it may be ahead and that the rank may still read.
    This requires that no worker ends: torch would give its turns to the others.

    Can be passed to worker processes under every start method.
    """

    def __init__(self, workers: int, ahead: int, held: int, shape: PackShape) -> None:
        """`ahead`: packs that a worker makes in advance; `held`: packs of a worker that the rank may still read."""
        self._count = ahead + held
        self._cell = shape.merge**2
        self._numbers_shape = (workers, self._count)
        self._patches_shape = (workers, self._count, shape.patches, 3 * shape.patch_size**2)
        self._offset = 8 * math.prod(self._numbers_shape)
        size = self._offset + math.prod(self._patches_shape)
        # Not in /dev/shm, which is small in containers: a write beyond its end kills the process.
        handle = os.memfd_create("patches")
        try:
            with sharing(f"the data workers, {size / 2**20:,.1f} MiB"):
                os.ftruncate(handle, size)
                self._memory = Arena(size, handle)
        except (OSError, OverflowError) as error:
            os.close(handle)
            if getattr(error, "errno", None) == errno.EFBIG and has_file_limit():
                raise
            raise ConfigError(
                f"{workers} workers need {size / 2**30:,.0f} GiB of shared memory for the patches of {self._count} "
                f"packs each, more than this machine gives ({error}): lower train_micro_batch_size_per_gpu, "
                "data.workers or data.pack_patches"
            ) from None
        weakref.finalize(self._memory, os.close, handle)

    def store(self, pack: Pack, worker: int, number: int) -> None:
        """Move the patches of pack `number` of a worker from the pack into its slot."""
        slot = number % self._count
        self._numbers()[worker, slot] = number
        np.concatenate(pack.patches, out=self._patches()[worker, slot, : self._used(pack)])
        pack.patches = []

    def restore(self, pack: Pack, worker: int, number: int) -> None:
        """Give an arrived pack its patches. They are valid until `held` more packs of its worker have been taken."""
        pack.patches = [self._patches()[worker, number % self._count, : self._used(pack)]]

    def check(self, worker: int, number: int) -> None:
        """Assert, after the patches of a pack were read, that the slot was not overwritten meanwhile."""
        found = self._numbers()[worker, number % self._count]
        assert found == number, f"pack {number} of worker {worker} was overwritten by its pack {found}"

    def _used(self, pack: Pack) -> int:
        return sum(pack.picture_lengths) or self._cell

    def _numbers(self) -> np.ndarray:
        count = math.prod(self._numbers_shape)
        return np.frombuffer(self._memory.buffer, np.int64, count).reshape(self._numbers_shape)

    def _patches(self) -> np.ndarray:
        return np.frombuffer(self._memory.buffer, np.uint8, offset=self._offset).reshape(self._patches_shape)
