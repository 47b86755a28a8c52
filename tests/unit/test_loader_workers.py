"""Worker processes of a loader: how they end, and how their errors reach the rank."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.errors import DataError
from tests.support.loading import DATA, encode, encode_with_a_bug, loaders, two_sources


@pytest.fixture
def sources(tmp_path: Path) -> tuple[SourceConfig, ...]:
    return two_sources(tmp_path)


def refuse(sample: Sample) -> list[Segment]:
    raise DataError(f"image cannot be decoded: {sample.key}")


def test_workers_have_one_thread_and_end(sources: tuple[SourceConfig, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (loader,) = loaders(sources, 1, workers=2)
        batch = next(iter(loader))[0]
        starts = batch.cu_segments[:-1][batch.real[batch.cu_segments[:-1].long()]]
        assert set(batch.tokens[starts.long() + 4].tolist()) == {1}
        assert len(multiprocessing.active_children()) == 2
        loader.close()
        assert not multiprocessing.active_children()
    finally:
        torch.set_num_threads(before)


def test_a_worker_does_not_collect_what_it_inherits(sources: tuple[SourceConfig, ...], tmp_path: Path) -> None:
    """FFmpeg's coders have threads, which a fork does not carry over; freed in a worker, they would wait for them."""

    class Inherited:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            (tmp_path / f"deleted by {os.getpid()}").touch()

    def collect(sample: Sample) -> list[Segment]:
        gc.collect()
        return encode(sample)

    gc.disable()
    try:
        Inherited()
        data = dataclasses.replace(DATA, workers=1)
        loader = Loader(data, sources, collect, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
        next(iter(loader))
        loader.close()
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.glob("deleted by *")] == [f"deleted by {os.getpid()}"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's half-made iterator
def test_workers_end_where_another_one_cannot_be_started(
    sources: tuple[SourceConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, numbers = BaseProcess.start, itertools.count()

    def start_one(process: BaseProcess) -> None:
        if next(numbers):
            raise OSError("no more processes")
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    (loader,) = loaders(sources, 1, workers=2)
    with pytest.raises(OSError, match="no more processes"):
        next(iter(loader))
    assert not multiprocessing.active_children()
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_end_the_run_with_their_message(sources: tuple[SourceConfig, ...], workers: int) -> None:
    data = dataclasses.replace(DATA, workers=workers)
    loader = Loader(data, sources, refuse, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
    with pytest.raises(
        DataError, match=r"^data\.sources, a: 2 of 2 samples are bad, .*: image cannot be decoded: a-"
    ) as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)
    assert loader.report()["a/errors"] == 2
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_taken_for_a_bad_sample(sources: tuple[SourceConfig, ...], workers: int) -> None:
    data = dataclasses.replace(DATA, workers=workers)
    loader = Loader(data, sources, encode_with_a_bug, 16, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1)
    with pytest.raises(ZeroDivisionError, match="a bug in encode"):
        next(iter(loader))
    loader.close()


@pytest.mark.parametrize("encode_name", ["encode", "encode_with_a_bug"])
def test_a_process_that_fails_with_an_open_loader_ends(
    encode_name: str, sources: tuple[SourceConfig, ...], tmp_path: Path
) -> None:
    """Also where the error came out of the stream and is kept, and with it the stream."""
    script = tmp_path / "fail.py"
    paths = [(source.name, str(source.path)) for source in sources]
    script.write_text(
        "import dataclasses\n"
        f"from dsmoe_vl.config.recipe import SourceConfig\n"
        f"from tests.support.loading import DATA, {encode_name}\n"
        "from dsmoe_vl.data.loader import Loader\n"
        f"sources = tuple(SourceConfig(name, path) for name, path in {paths!r})\n"
        "data = dataclasses.replace(DATA, workers=1)\n"
        f"loader = Loader(data, sources, {encode_name}, 16, 2, 1, 0, 1, micro_batch=1, accumulation=1)\n"
        "try:\n"
        "    next(iter(loader))\n"
        "except ZeroDivisionError as error:\n"
        "    kept = error\n"
        "    loader.close()\n"
        "raise RuntimeError('the end')\n"
    )
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(root)}, timeout=60, check=False
    )
    assert ended.returncode == 1


def test_a_worker_that_is_stopped_is_named_with_what_it_read(sources: tuple[SourceConfig, ...]) -> None:
    (loader,) = loaders(sources, 1, workers=2)
    batches = iter(loader)
    next(batches)
    stopped = max(process.pid or 0 for process in multiprocessing.active_children())  # worker 1
    os.kill(stopped, signal.SIGSTOP)
    enough = threading.Event()

    def read() -> None:
        while not enough.is_set():
            next(batches)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        end = time.monotonic() + 60
        while not (said := re.fullmatch(_STOPPED, loader.waits_for())) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        enough.set()
        os.kill(stopped, signal.SIGCONT)
        reader.join()
        loader.close()
    assert said is not None and said.groups() == ("1", str(stopped))


_STOPPED = (
    r"worker (\d) of rank 0 \(pid (\d+)\) has sent nothing for \d+ s: a signal has stopped it; "
    r"it was reading sample \d+ of \S+\.tar(?:, [ab]-\d+-\d+)?"  # the key once it has been read
)


def test_without_workers_the_rank_says_what_it_read(sources: tuple[SourceConfig, ...]) -> None:
    (loader,) = loaders(sources, 1, workers=0)
    assert loader.waits_for() == ""
    next(iter(loader))
    assert re.fullmatch(r"it reads its data itself, last sample \d+ of \S+\.tar, [ab]-\d+-\d+", loader.waits_for())
