"""Whoever reads for weeks needs no more memory than after the first minutes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic.films import encode_mp4
from data_tools.tokenizer.train import train as train_tokenizer
from dsmoe_vl.config.model import ModelConfig, VisionConfig
from dsmoe_vl.config.recipe import DataConfig, Recipe, SourceConfig, TasksConfig
from dsmoe_vl.config.task_table import CaptionConfig, RetrievalConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.support.tars import encoded_as, picture, write_index, write_tar

WARM = 10_000
LEAST_LEAK = 100  # bytes a sample that would be noticed; most of a process is the libraries that it has loaded


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, ...]:
    """Pictures and videos so small that reading them, and not decoding, takes the time; and a bad one now and then."""
    folder = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)
    formats = ("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")
    for name, count in (("images", 400), ("videos", 20)):
        for shard in range(4):
            members = []
            for i in range(count // 4):
                key, (file_format, extension) = f"{shard}-{i}", formats[i % 20 if i % 20 < 3 else 0]
                width, height = (int(side) for side in rng.integers(16, 40, 2))
                media = encoded_as(picture(width, height, i), file_format)
                if name == "videos":
                    extension, media = "mp4", encode_mp4([picture(32, 32, j) for j in range(6)])
                if i == 7 and shard == 1:
                    media = media[:100]
                text = "a picture of " + " ".join(rng.choice(["red", "green", "blue"], int(rng.integers(1, 9))))
                meta = json.dumps({"captions": [text, text[:9]], "id": key}).encode()
                members += [(f"{key}.{extension}", media), (f"{key}.txt", text.encode()), (f"{key}.json", meta)]
            write_tar(folder / name / f"{shard}.tar", members)
        write_index(folder / name, {f"{shard}.tar": count // 4 for shard in range(4)})
    train_tokenizer([folder / "images"], folder / "tokenizer.model", vocab_size=300)
    return SourceConfig("images", str(folder / "images"), 32.0), SourceConfig("videos", str(folder / "videos"), 1.0)


def anonymous_bytes(pid: int) -> int:
    """Memory that a process has written to and that is in RAM.

    Not the whole RSS, which also grows by pages of libraries that are used for the first time; and not what is private,
    which grows whenever either side writes to a page that a fork has left to both.
    """
    found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells how much memory a process uses")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("samples", [25_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_memory_of_a_worker_stays_flat(sources: tuple[SourceConfig, ...], tmp_path: Path, samples: int) -> None:
    """Within 5 % from 10,000 samples on, and so does that of its rank."""
    data = DataConfig(
        sources=sources, pack_length=2048, pack_patches=2048, image_max_patches=4, frame_max_patches=4, video_frames=3,
        frame_pool=1, lanes=8, lookahead=32, shuffle_block=32, workers=1, max_bad_fraction=0.5,
    )  # fmt: skip
    recipe = Recipe(
        model=ModelConfig(vision=VisionConfig(patch_size=8, merge=2)),
        tasks=TasksConfig(caption=CaptionConfig(word_dropout=0.1), retrieval=RetrievalConfig(weight=1.0)),
        data=data,
    )
    folder = Path(sources[0].path).parent
    encode = Encoder(build_tasks(recipe, Tokenizer(folder / "tokenizer.model")))
    loader = Loader(data, sources, encode, 8, 2, 1, 0, 1, 1, 4, quarantine=tmp_path / "quarantine.jsonl")
    before: list[int] = []  # of worker and rank, when all that is kept for good has been seen
    for _ in loader:
        report = loader.report()
        read = report["images/samples"] + report["videos/samples"]
        if not before and read >= WARM:
            (worker,) = multiprocessing.active_children()
            pids = worker.pid, os.getpid()
            before = [anonymous_bytes(pid) for pid in pids if pid]
        if read >= samples:
            break
    after = [anonymous_bytes(pid) for pid in pids if pid]
    loader.close()
    assert report["videos/samples"] > samples / 50 and report["images/epoch"] > samples / 500
    assert report["images/errors"] > samples / 500
    for was, now in zip(before, after, strict=True):
        assert now < 1.05 * was
        assert now - was < LEAST_LEAK * (samples - WARM)
