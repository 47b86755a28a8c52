"""Corruptions of the files in a shard, and a child process that looks at what was made."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import shutil
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_vl.config.model import ModelConfig, VisionConfig
from dsmoe_vl.config.recipe import DataConfig, Recipe, SourceConfig, TasksConfig
from dsmoe_vl.config.task_table import RetrievalConfig, SummaryConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.shards import index
from dsmoe_vl.data.shards.index import ShardIndex, read_sample
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from tests.support.fuzz_tars import (
    CATEGORY,
    SECONDS,
    Case,
    Rng,
    by_key,
    cut_out,
    double_member,
    flip_bits,
    header_field,
    in_place,
    insert,
    overwrite,
    pax_headers,
    pick,
    sound,
    strange_members,
    strange_names,
    swap,
    swap_blocks,
    tar_of,
    truncate,
    wrong_size,
    wrong_type,
    zero_blocks,
)
from tests.support.tars import write_index, write_tar


def media(extensions: tuple[str, ...]) -> Callable[[Rng], Case]:
    """One picture or video changed inside, in a sound tar."""

    def corrupt(rng: Rng) -> Case:
        members = list(sound())
        chosen = [i for i, (name, _) in enumerate(members) if name.endswith(extensions)]
        number = pick(rng, chosen)
        name, data = members[number]
        members[number] = name, corrupted_bytes(rng, data)
        key, _, extension = name.partition(".")
        return Case(tar_of(members), frozenset({(key, extension)}))

    return corrupt


def corrupted_bytes(rng: Rng, original: bytes) -> bytes:
    data = bytearray(original)
    header = min(len(data), 600)  # where sizes and tables stand
    match int(rng.integers(8)):
        case 0:
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        case 1:
            for _ in range(20):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
        case 2:
            for _ in range(4):
                data[int(rng.integers(header))] = pick(rng, [0, 255, 127, 128])
        case 3:
            at = int(rng.integers(header))
            data[at : at + 4] = pick(rng, [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"])
        case 4:
            del data[int(rng.integers(len(data))) :]
        case 5:
            at = int(rng.integers(len(data)))
            data[at:at] = rng.bytes(pick(rng, [1, 16, 1000]))
        case 6:
            at, length = int(rng.integers(len(data))), pick(rng, [8, 200])
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 7:
            one, other = (int(rng.integers(max(1, len(data) - 64))) for _ in range(2))
            swap(data, one, other, 64)
    return bytes(data)


def json_values(rng: Rng) -> Case:
    """One KEY.json with bytes or values that nobody expects, or one KEY.txt with bytes."""
    members = list(sound())
    number = int(rng.integers(6)) * 3 + pick(rng, [1, 2, 2, 2])
    name, data = members[number]
    if number % 3 == 1 or rng.random() < 0.2:
        members[number] = name, corrupted_bytes(rng, data)
    else:
        meta = json.loads(data)
        for _ in range(pick(rng, [1, 1, 3])):
            meta[pick(rng, PLACES)] = pick(rng, VALUES)
        members[number] = name, pick(rng, [str.encode] * 10 + ENCODINGS)(json.dumps(meta))
    key, _, extension = name.partition(".")
    return Case(tar_of(members), frozenset({(key, extension)}))


PLACES = ("captions", "tasks", "importance", "saliency", "duration_seconds", "summary", "content", "id", "width")
VALUES: list[Any] = [
    None, True, -1, 0, 1e308, -0.0, 10**30, 10**400, "", "x", "1", "é" * 1000, [], [[]], {}, [None], [1, "a"], {"a": 1},
    [0.5], [2.0], [-1e-9], [[0.5], [0.5, 0.6]], ["a"] * 1000, [1e39], [True, False], "\ud800", ["\udfff a"],
    float("nan"), [float("nan")], float("inf"), [float("inf")], 1e-310, "word " * 20000,
]  # fmt: skip
ENCODINGS: list[Callable[[str], bytes]] = [
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("utf-32-be"),
    lambda text: b"[" * 900 + text.encode(),
    lambda text: text.encode()[:-1] + b', "content": ' + b"[" * 900 + b"]" * 900 + b"}",
    lambda text: text.encode()[:-1] + b', "content": "\xed\xa0\x80"}',  # a surrogate without an escape
    lambda text: text.encode().replace(b":", b": \0", 1),
    lambda text: b"",
    lambda text: b"null",
    lambda text: b'{"a": 1' + b"0" * 10000 + b"}",
]


# What is done to the tar itself, each equally often; then what is done to the files in it.
TAR: list[Callable[[Rng], Case]] = [
    in_place(flip_bits), in_place(overwrite), in_place(zero_blocks), in_place(swap_blocks), in_place(header_field),
    in_place(wrong_size), in_place(wrong_type), truncate, insert, cut_out, double_member, strange_members, pax_headers,
    strange_names,
]  # fmt: skip
PARTS: dict[str, list[Callable[[Rng], Case]]] = {
    "tars": TAR,
    "images": [media((".jpg", ".png", ".webp", ".jpeg"))],
    "videos": [media((".mp4",))],
    "json": [json_values],
}
NUMBERS = {"tars": 224, "images": 96, "videos": 90, "json": 90}  # 500


class Examiner:
    """Reads corrupted shards as a run does, and holds every sample to what it was before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = DataConfig(
            pack_length=320, pack_patches=256, image_max_patches=16, frame_max_patches=4, video_frames=3,
            frame_pool=1, lanes=1, lookahead=4, shuffle_block=4, workers=0, max_bad_fraction=1.0,
        )  # fmt: skip
        self.source = SourceConfig("corrupt", str(folder / "shards"))
        recipe = Recipe(
            model=ModelConfig(vision=VisionConfig(patch_size=8, merge=2)),
            tasks=TasksConfig(retrieval=RetrievalConfig(weight=1.0), summary=SummaryConfig(weight=1.0)),
            data=self.data,
        )
        self.tokenizer = Tokenizer(folder / "tokenizer.model")
        self.encode = Encoder(build_tasks(recipe, self.tokenizer))
        self.case = Case(b"")
        self.outcomes = {"whole": 0, "changed": 0, "bad": 0}

    def examine(self, number: int, part: str) -> dict[str, int]:
        """How many samples were read whole, read with changes of their own, and refused. Fails for anything else."""
        rng = np.random.default_rng([7, list(PARTS).index(part), number])
        kinds = PARTS[part]
        self.case = kinds[number % len(kinds)](rng)
        self.outcomes = dict.fromkeys(self.outcomes, 0)
        folder = self.folder / "shards"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / "a.tar"
        match int(rng.integers(3)):
            case 0:  # a folder that has no manifest
                path.write_bytes(self.case.tar)
            case 1:  # one that has been written before the corruption
                write_tar(path, sound())
                write_index(folder, {"a.tar": 6})
                path.write_bytes(self.case.tar)
            case 2:  # one that only knows how many samples there were
                path.write_bytes(self.case.tar)
                write_index(folder, {"a.tar": 6})
        read_shard_anew()
        try:
            self._read_one_by_one()
            self._read_as_a_run()
        except DataError as error:
            self._check_reason(error)
        return self.outcomes

    def _read_one_by_one(self) -> None:
        index = ShardIndex.load(self.source.path)
        for sample in range(index.samples):
            try:
                self._encode(read_sample(index, 0, sample, self.source))
            except DataError as error:
                self._check_reason(error)
                self.outcomes["bad"] += 1

    def _read_as_a_run(self) -> None:
        loader = Loader(
            self.data, (self.source,), self._encode, 8, 2, seed=1, rank=0, ranks=1, micro_batch=1, accumulation=1
        )
        for _ in zip(range(3), loader, strict=False):
            pass

    def _encode(self, sample: Sample) -> list[Segment]:
        self._check(sample)
        return self.encode(sample)

    def _check(self, sample: Sample) -> None:
        """Every file of a sample is what it was, unless it was itself corrupted; and none is missing."""
        files = by_key(sound())
        key = sample.key if sample.key in files else self.case.renamed
        assert key, f"a sample {sample.key!r} that never was"
        whole = files[key]
        kind = next(extension for extension in whole if extension not in ("txt", "json"))
        assert sample.media is not None and sample.media_type == kind, f"{sample.key}: half a sample, no {kind}"
        given = {kind: sample.media, "txt": sample.text.encode(), "json": sample.meta}
        for extension, value in given.items():
            was: Any = json.loads(whole["json"]) if extension == "json" else whole[extension]
            if value != was:
                assert (key, extension) in self.case.changed, f"{sample.key}.{extension} is not what it was"
                for other, others in files.items():
                    theirs: Any = json.loads(others["json"]) if extension == "json" else others.get(extension)
                    assert other == key or value != theirs, f"{sample.key}.{extension} is that of {other}"
        self.outcomes["changed" if any(changed == key for changed, _ in self.case.changed) else "whole"] += 1

    @staticmethod
    def _check_reason(error: DataError) -> None:
        text = str(error)
        category = text.partition(":")[0]
        known = CATEGORY.fullmatch(category) or text.startswith(("/", "data.sources, corrupt: "))
        assert known, f"no category: {text[:300]!r}"
        assert "Traceback" not in text and "\n" not in text[:200], text
        text.encode()  # the quarantine list is UTF-8


def read_shard_anew() -> None:
    """Scans are remembered by path."""
    index._cached_scan.cache_clear()


def examine_all(folder: Path, ours: Connection) -> None:
    """In a process of its own: tells before and after each corruption, and the stacks where one takes too long."""
    examiner = Examiner(folder)
    with (folder / "stacks").open("w") as stacks:
        while job := ours.recv():
            part, number = job
            faulthandler.dump_traceback_later(SECONDS - 2, file=stacks)
            try:
                ours.send(examiner.examine(number, part))
            except Exception:
                ours.send(traceback.format_exc())


class Child:
    """The process that examines; a new one after a crash or a hang."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: BaseProcess | None = None

    def examine(self, part: str, number: int) -> dict[str, int] | str:
        """The numbers of samples, or what went wrong."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=examine_all, args=(self.folder, theirs), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((part, number))
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            self.end()
            return f"not done after {SECONDS} s\n{(self.folder / 'stacks').read_text()}"
        except (EOFError, ConnectionError):
            self.process.join(10)
            status, self.process = self.process.exitcode, None
            return f"the process crashed with status {status}"

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None
