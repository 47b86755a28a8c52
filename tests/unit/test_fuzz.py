"""Random corruptions of shards: a sample comes out whole, or not at all and with the reason.

What decodes the corrupted bytes runs in a process of its own, where a crash or a hang of libjpeg or FFmpeg is seen as
such.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_tools.synthetic.films import film
from data_tools.tokenizer.train import train as train_tokenizer
from dsmoe_vl.data import decode
from dsmoe_vl.data.decode import decode_video
from dsmoe_vl.data.shards.index import ShardIndex, read_sample
from dsmoe_vl.errors import DataError
from tests.support import fuzz_files
from tests.support.fuzz_files import ENCODINGS, NUMBERS, PARTS, PLACES, VALUES, Child, Examiner, read_shard_anew
from tests.support.fuzz_tars import BLOCK, by_key, sound, swap, tar_of
from tests.support.tars import Member, write_index, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    write_tar(made / "sound" / "a.tar", sound())
    train_tokenizer([made / "sound"], made / "tokenizer.model", vocab_size=300)
    return made


@pytest.fixture(scope="module")
def child(folder: Path) -> Iterator[Child]:
    one = Child(folder)
    yield one
    one.end()


@pytest.mark.parametrize("part", list(PARTS))
def test_corrupt_shards_give_whole_samples_or_reasons(part: str, child: Child) -> None:
    failures: list[str] = []
    total: Counter[str] = Counter()
    for number in range(NUMBERS[part]):
        found = child.examine(part, number)
        if isinstance(found, str):
            failures.append(f"{part} {number}: {found}")
        else:
            total.update(found)
    assert not failures, f"{len(failures)} of {NUMBERS[part]}\n" + "\n".join(failures)
    assert total["whole"] > NUMBERS[part] and total["bad"] > NUMBERS[part] / 4, total  # it tested something


def test_a_crash_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would tell of a segmentation fault, and go on."""
    monkeypatch.setattr(fuzz_files, "SECONDS", 20.0)
    one = Child(folder)
    assert isinstance(one.examine("images", 0), dict)
    assert one.process is not None and one.process.pid is not None
    os.kill(one.process.pid, signal.SIGSEGV)
    one.process.join(20)
    assert one.examine("images", 1) == f"the process crashed with status {-signal.SIGSEGV}"
    assert isinstance(one.examine("images", 2), dict)
    one.end()


def test_every_strange_value_in_every_place(folder: Path) -> None:
    """KEY.json comes from anywhere; whatever it holds, a sample of it is used or refused."""
    examiner = Examiner(folder)
    place = folder / "shards"
    failures = []
    for extension in ("jpg", "mp4"):
        files = next(one for one in by_key(sound()).values() if extension in one)
        meta = json.loads(files["json"])
        texts = [json.dumps({**meta, name: value}).encode() for name in PLACES for value in VALUES]
        for text in [*texts, *(encode(json.dumps(meta)) for encode in ENCODINGS)]:
            shutil.rmtree(place, ignore_errors=True)
            write_tar(
                place / "a.tar", [(f"k.{name}", text if name == "json" else data) for name, data in files.items()]
            )
            read_shard_anew()
            try:
                examiner.encode(read_sample(ShardIndex.load(place), 0, 0))
            except DataError as error:
                examiner._check_reason(error)
            except Exception as error:
                failures.append(f"{extension}, {text[-200:]!r}: {error!r}")
    assert not failures, "\n".join(failures)


def as_before(folder: Path, members: list[Member]) -> None:
    """Fails where a sample is read that is not, in all its files, one of `members`."""
    read_shard_anew()
    whole = by_key(members)
    index = ShardIndex.load(folder)
    for sample in range(index.samples):
        with contextlib.suppress(DataError):
            found = read_sample(index, 0, sample)
            files = whole[found.key]
            assert (found.media, found.text.encode()) == (files["jpg"], files["txt"]), found.key
            assert found.meta == json.loads(files["json"]), found.key


def photos(count: int) -> list[Member]:
    """All files smaller than a block, so that their headers are alike; of different contents."""
    return [
        member
        for i in range(count)
        for member in ((f"{i}.jpg", b"%d" % i * 300), (f"{i}.txt", b"text %d" % i), (f"{i}.json", b'{"n": %d}' % i))
    ]


def test_two_headers_that_changed_places(tmp_path: Path) -> None:
    """Each stands before the other's data, and no checksum tells; but there are more samples than in the manifest."""
    path = write_tar(tmp_path / "a.tar", photos(5))
    write_index(tmp_path, {"a.tar": 5})
    sound_bytes = path.read_bytes()
    headers = range(0, 15 * 2, 2)  # of three files a sample, each of a block
    for one, other in itertools.combinations(headers, 2):
        if one // 6 == other // 6:  # of one sample
            continue
        data = bytearray(sound_bytes)
        swap(data, one * BLOCK, other * BLOCK, BLOCK)
        path.write_bytes(data)
        as_before(tmp_path, photos(5))


def test_a_copy_that_stopped(tmp_path: Path) -> None:
    """It may have its full size at once, and zeros in place of what is still to come."""
    whole = write_tar(tmp_path / "a.tar", photos(60)).read_bytes()
    for blocks in range(6, 24):
        (tmp_path / "a.tar").write_bytes(whole[: blocks * BLOCK].ljust(len(whole), b"\0"))
        as_before(tmp_path, photos(60))


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE], ids=["link", "symlink", "sparse"]
)
@pytest.mark.parametrize("number", range(3))  # of a file in its sample
def test_a_file_that_is_a_link_or_sparse(kind: bytes, number: int, tmp_path: Path) -> None:
    """As `tar` writes equal captions that are one file on disk, and `tar --sparse` files with holes."""

    linked = [name for name, _ in photos(3) if name.startswith("1.")][number]

    def header(name: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        if name == linked:
            info.type, info.linkname = kind, linked.replace("1.", "0.")
        return info

    members = [(name, b"" if name == linked else data) for name, data in photos(3)]
    (tmp_path / "a.tar").write_bytes(tar_of(members, header))
    as_before(tmp_path, photos(3))


def test_deeply_nested_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("k.jpg", b""), ("k.json", b"[" * 10**5)])
    with pytest.raises(DataError, match="malformed text or JSON"):
        read_sample(ShardIndex.load(tmp_path), 0, 0)


def test_a_video_names_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A playlist is read as such, and shows whatever video lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("private.mp4").write_bytes(film(np.random.default_rng(0), False, 48, 1)[0])
    with pytest.raises(DataError):
        decode_video(b"ffconcat version 1.0\nfile private.mp4\n", 2)


def test_a_video_whose_frames_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i, size in enumerate((64, 64, 640, 640)):
            encoder = av.CodecContext.create("mpeg4", "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = size, size, "yuv420p", Fraction(1, 25)
            frame = av.VideoFrame.from_ndarray(np.zeros((size * 3 // 2, size), np.uint8), format="yuv420p")
            for packet in [*encoder.encode(frame), *encoder.encode()]:
                packet.stream, packet.pts, packet.dts = stream, i, i
                container.mux(packet)
    assert max(pixels.size for _, pixels in decode_video(buffer.getvalue(), 4)) == 640 * 640 * 3
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    with pytest.raises(DataError):
        decode_video(buffer.getvalue(), 4)


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The type and body of each box of an MP4."""
    found = []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append((data[4:8], data[8:size]))
        data = data[size:]
    return found


def box(kind: bytes, body: bytes) -> bytes:
    return (len(body) + 8).to_bytes(4, "big") + kind + body


def repeating(kind: bytes, body: bytes, size: int, count: int, place: int) -> bytes:
    """A box of an MP4's index, changed to name the same `size` bytes at `place` for each of `count` frames."""
    numbers = {
        b"stsz": [0, size, count],
        b"stsc": [0, 1, 1, 1, 1],
        b"stco": [0, count, *[place] * count],
        b"stts": [0, 1, count, 100],
    }
    if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        return box(kind, b"".join(repeating(*inner, size, count, place) for inner in boxes(body)))
    if kind in (b"ctts", b"stss", b"edts"):
        return b""
    return box(kind, np.array(numbers[kind], ">u4").tobytes() if kind in numbers else body)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
def test_an_index_that_names_the_same_bytes_again_and_again() -> None:
    """A file of 120 kB with 200 MB of frames; it could as well be 200 GB."""
    whole = boxes(film(np.random.default_rng(0), False, 48, 1)[0])
    (moov,) = (body for kind, body in whole if kind == b"moov")
    before = b"".join(box(kind, body) for kind, body in whole if kind not in (b"moov", b"mdat"))
    bomb = before + box(b"mdat", bytes(100_000)) + repeating(b"moov", moov, 100_000, 2000, len(before) + 8)

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before_kilobytes = kilobytes("VmRSS")
    with pytest.raises(DataError):
        decode_video(bomb, 4)
    assert kilobytes("VmHWM") < before_kilobytes + 50_000
