"""Patches that come through shared memory are those that the worker made."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import IGNORE, Modality, Pack, Picture, Segment
from dsmoe_vl.data.slots import PatchSlots
from dsmoe_vl.errors import ConfigError, DataError
from tests.support.loading import DATA, encode_picture
from tests.support.tars import encoded_as, picture, write_tar

pytestmark = pytest.mark.timeout(60)
SHAPE = PackShape(length=8, patches=8, patch_size=4, merge=2)


def pack(value: int, pictures: int = 1) -> Pack:
    """`pictures` of one cell each, all bytes of them `value`."""
    cells = np.arange(pictures, dtype=np.int32)
    tokens, labels = np.full(4, 5, np.int32), np.full(4, IGNORE, np.int32)
    shown = [Picture(np.full((4, 48), value, np.uint8), (2, 2), -1.0, cells[i : i + 1]) for i in range(pictures)]
    return assemble([Segment(task_number("caption"), tokens, labels, np.full(4, Modality.TEXT), shown)], SHAPE)


@pytest.fixture
def photos(tmp_path: Path) -> SourceConfig:
    members = [(f"{i:03}.jpg", encoded_as(picture(32 + 16 * (i % 3), 32, seed=i), "JPEG")) for i in range(60)]
    write_tar(tmp_path / "shards" / "a.tar", members)
    return SourceConfig("a", str(tmp_path / "shards"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("workers", "micro_batch", "accumulation"), [(1, 1, 1), (2, 3, 1), (4, 1, 3), (2, 2, 4)])
def test_batches_of_workers_equal_those_of_the_process_itself(
    photos: SourceConfig, workers: int, micro_batch: int, accumulation: int
) -> None:
    def steps(count: int) -> list[Batch]:
        data = dataclasses.replace(DATA, pack_length=16, pack_patches=40, workers=count)
        loader = Loader(data, (photos,), encode_picture, 8, 2, 1, 0, 1, micro_batch, accumulation)
        found: list[Batch] = []
        for number, batches in zip(range(12), loader, strict=False):
            time.sleep(0.05 * (number % 3 == 0) * (count > 0))  # the workers get as far ahead as they can
            found += batches
        loader.close()
        return found

    for theirs, own in zip(steps(workers), steps(0), strict=True):
        assert theirs.patches.any()
        for field in dataclasses.fields(Batch):
            a, b = getattr(theirs, field.name), getattr(own, field.name)
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


def test_a_pack_without_pictures_has_an_empty_cell_wherever_it_lies() -> None:
    slots = PatchSlots(workers=1, ahead=1, held=1, shape=SHAPE)
    for number, pictures in enumerate([2, 2, 0, 0]):  # the slots of the first two are used again
        made = pack(200, pictures)
        expected = collate([made]).patches
        slots.store(made, 0, number)
        assert made.patches == []
        slots.restore(made, 0, number)
        assert torch.equal(collate([made]).patches, expected)
        slots.check(0, number)


def test_more_memory_than_there_is_names_what_to_lower() -> None:
    for ahead in (10**9, 10**30):  # the system refuses the one, Python the other
        with pytest.raises(ConfigError, match=r"GiB of shared memory .* lower train_micro_batch_size_per_gpu"):
            PatchSlots(workers=1000, ahead=ahead, held=1, shape=SHAPE)


def test_a_pack_that_was_overwritten_is_noticed() -> None:
    slots = PatchSlots(workers=2, ahead=1, held=1, shape=SHAPE)
    for number in range(3):
        slots.store(pack(number), 1, number)
    slots.check(1, 1)
    slots.check(1, 2)
    with pytest.raises(AssertionError, match="pack 0 of worker 1 was overwritten by its pack 2"):
        slots.check(1, 0)


def _store(slots: PatchSlots) -> None:
    slots.store(pack(77), 1, 5)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_every_way_to_start_a_worker_shares_them(method: str) -> None:
    context = multiprocessing.get_context(method)
    slots = PatchSlots(workers=2, ahead=2, held=1, shape=SHAPE)
    process = context.Process(target=_store, args=(slots,))
    process.start()
    process.join(50)
    arrived = pack(0)
    slots.restore(arrived, 1, 5)
    slots.check(1, 5)
    assert (arrived.patches[0] == 77).all()


class FailsOnOneWorker:
    """Worker `workers` - 2 raises `error` at its sample `number`; the last worker is slow."""

    def __init__(self, workers: int, number: int, error: Exception) -> None:
        self.workers, self.number, self.error, self.seen = workers, number, error, 0

    def __call__(self, sample: Sample) -> list[Segment]:
        worker, self.seen = torch.utils.data.get_worker_info().id, self.seen + 1
        if worker == self.workers - 2 and self.seen == self.number:
            raise self.error
        time.sleep(0.05 * (worker == self.workers - 1))
        tokens = np.full(16, self.seen, np.int32)
        return [Segment(task_number("caption"), tokens, tokens.copy(), np.zeros(16, np.int32))]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "error", [DataError("image cannot be decoded: x"), ZeroDivisionError("a bug")], ids=["data", "bug"]
)
@pytest.mark.parametrize(("workers", "accumulation", "number"), [(3, 5, 3), (4, 16, 5), (4, 32, 9)])
def test_the_error_of_one_worker_is_what_ends_the_stream(
    photos: SourceConfig, workers: int, accumulation: int, number: int, error: Exception
) -> None:
    """And it ends it at its own step, though the others go on."""
    data = dataclasses.replace(
        DATA, pack_length=16, pack_patches=8, lanes=workers, lookahead=1, workers=workers, max_bad_fraction=0.0001
    )
    encode = FailsOnOneWorker(workers, number, error)
    loader = Loader(data, (photos,), encode, 8, 2, 1, 0, 1, 1, accumulation)
    steps = 0
    with pytest.raises((DataError, ZeroDivisionError), match=r"image cannot be decoded: x|a bug"):
        for _ in loader:
            steps += 1
    loader.close()
    pack = workers - 2 + (number - 1) * workers  # of the whole stream
    assert steps == pack // accumulation
