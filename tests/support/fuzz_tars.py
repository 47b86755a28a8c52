"""Corruptions of tars: what is done to a sound shard, and which of its files then may differ."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from tests.support.tars import Member, encoded_as, picture

SECONDS = 60.0  # for one corruption, on a machine that is busy with other things
BLOCK = tarfile.BLOCKSIZE
# The category of a bad sample, by which it is counted; what comes after the colon may be anything.
CATEGORY = re.compile(r"[a-zA-Z][a-zA-Z ,]{3,80}")

T = TypeVar("T")
Rng = np.random.Generator
Files = dict[str, dict[str, bytes]]  # by key and extension


class Case(NamedTuple):
    """A corrupted tar. `changed` are the files, by key and extension, whose own bytes or header are not what they were;
    `renamed` is the key of a sample that has another one.
    """

    tar: bytes
    changed: frozenset[tuple[str, str]] = frozenset()
    renamed: str = ""


class Place(NamedTuple):
    """Where a file of a sample lies in the sound tar: from its (first) header to the end of its padding."""

    key: str
    extension: str
    start: int
    data: int
    end: int


@cache
def sound() -> list[Member]:
    """Six samples: photographs of three formats, small and larger, and two videos."""
    members: list[Member] = []
    photos = {"jpg": ("JPEG", {}), "png": ("PNG", {}), "webp": ("WEBP", {}), "jpeg": ("JPEG", {"progressive": True})}
    for number, (extension, (file_format, options)) in enumerate(photos.items()):
        _, meta = scene(np.random.default_rng(number), False, 48, 2)
        image = picture(40 + 24 * number, 48, number)
        members += files_of(f"k-{number}", extension, encoded_as(image, file_format, **options), meta)
    for number in (4, 5):
        media, meta = film(np.random.default_rng(number), False, 48, 1)
        members += files_of(f"k-{number}", "mp4", media, meta)
    return members


def files_of(key: str, extension: str, media: bytes, meta: dict[str, Any]) -> list[Member]:
    text = f"{meta['captions'][0]} ünd {key}"
    meta = {**meta, "id": key, "captions": [text, *meta["captions"]]}
    return [
        (f"{key}.{extension}", media),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", json.dumps(meta, ensure_ascii=False).encode()),
    ]


def tar_of(
    members: list[Member],
    change: Callable[[str], tarfile.TarInfo] = tarfile.TarInfo,
    tar_format: int = tarfile.PAX_FORMAT,
) -> bytes:
    """`change` makes the header of a name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, errors="surrogateescape") as tar:
        for name, data in members:
            info = change(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@cache
def sound_tar() -> tuple[bytes, tuple[Place, ...]]:
    data = tar_of(sound())
    places, start = [], 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            end = info.offset_data + -(-info.size // BLOCK) * BLOCK
            places.append(Place(key, extension, start, info.offset_data, end))
            start = end
    return data, tuple(places)


def by_key(members: list[Member]) -> Files:
    files: Files = {}
    for name, data in members:
        key, _, extension = name.partition(".")
        files.setdefault(key, {})[extension] = data
    return files


def pick(rng: Rng, options: Sequence[T]) -> T:
    """One of them, as it is: numpy's own choice strips NULs from bytes."""
    return options[int(rng.integers(len(options)))]


def files_at(start: int, end: int) -> frozenset[tuple[str, str]]:
    """The files of the sound tar that have bytes in [start, end)."""
    return frozenset(
        (place.key, place.extension) for place in sound_tar()[1] if place.start < end and start < place.end
    )


def any_offset(rng: Rng) -> int:
    """A byte of the sound tar's members, as often as not the first of a block."""
    return pick(rng, [int(rng.integers(end_of_members())), int(rng.integers(end_of_members() // BLOCK)) * BLOCK])


def in_place(change: Callable[[Rng, bytearray], None]) -> Callable[[Rng], Case]:
    def corrupt(rng: Rng) -> Case:
        original, _ = sound_tar()
        data = bytearray(original)
        change(rng, data)
        (different,) = np.nonzero(np.frombuffer(original, np.uint8) != np.frombuffer(data, np.uint8))
        return Case(bytes(data), frozenset().union(*(files_at(at, at + 1) for at in different.tolist())))

    return corrupt


def end_of_members() -> int:
    return sound_tar()[1][-1].end


def flip_bits(rng: Rng, data: bytearray) -> None:
    for _ in range(pick(rng, [1, 3, 30])):
        data[int(rng.integers(end_of_members()))] ^= 1 << int(rng.integers(8))


def overwrite(rng: Rng, data: bytearray) -> None:
    at, length = int(rng.integers(end_of_members())), pick(rng, [4, 512, 3000])
    noise = rng.bytes(length)[: end_of_members() - at]
    data[at : at + len(noise)] = noise


def zero_blocks(rng: Rng, data: bytearray) -> None:
    """Not the last blocks: a tar ends with zeros, of which there may be more (see `test_a_copy_that_stopped`)."""
    blocks = end_of_members() // BLOCK - 8
    at, count = int(rng.integers(blocks)) * BLOCK, pick(rng, [1, 2, 7]) * BLOCK
    data[at : at + count] = bytes(count)


def swap_blocks(rng: Rng, data: bytearray) -> None:
    """Not two headers, which only a manifest tells: see `test_two_headers_that_changed_places`."""
    headers = {place.data - BLOCK for place in sound_tar()[1]}
    while True:
        one, other = (int(rng.integers(end_of_members() // BLOCK)) * BLOCK for _ in range(2))
        if not (one in headers and other in headers):
            break
    swap(data, one, other, BLOCK)


def swap(data: bytearray, one: int, other: int, length: int) -> None:
    first, second = bytes(data[one : one + length]), bytes(data[other : other + length])
    data[one : one + length], data[other : other + length] = second, first


def header_field(rng: Rng, data: bytearray) -> None:
    """A field of one header, with or without the checksum that belongs to it."""
    at = pick(rng, sound_tar()[1]).data - BLOCK
    field = {"mode": (100, 8), "mtime": (136, 12), "magic": (257, 8), "checksum": (148, 8)}
    start, length = pick(rng, list(field.values()))
    data[at + start : at + start + length] = rng.bytes(length)
    if rng.random() < 0.5:
        correct_checksum(data, at)


def wrong_size(rng: Rng, data: bytearray) -> None:
    """Not one by which the next header is looked for at another one's place: that is a sound tar of other contents."""
    _, places = sound_tar()
    place = pick(rng, places)
    at, starts = place.data - BLOCK, {other.start for other in places} | {end_of_members()}
    size = next(
        size
        for size in iter(lambda: pick(rng, [0, int(rng.integers(2**14)), int(rng.integers(2**33)), place.end]), None)
        if place.data + -(-size // BLOCK) * BLOCK not in starts - {place.end}
    )
    data[at + 124 : at + 136] = pick(rng, [b"%011o\0" % size, b"%11o " % size, b"\x80" + size.to_bytes(11, "big")])
    if rng.random() < 0.8:
        correct_checksum(data, at)


def wrong_type(rng: Rng, data: bytearray) -> None:
    """A link, a device or a folder, whose data are no headers; any other type where the checksum shows the damage."""
    at = pick(rng, sound_tar()[1]).data - BLOCK
    correct = bool(rng.random() < 0.6)
    data[at + 156] = pick(rng, b"123456" if correct else b"123456SxgLKZ\xff")
    if correct:
        correct_checksum(data, at)


def correct_checksum(data: bytearray, at: int) -> None:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def truncate(rng: Rng) -> Case:
    size = any_offset(rng)
    return Case(sound_tar()[0][:size], files_at(size, size + 1))


def insert(rng: Rng) -> Case:
    """Bytes between or inside of files; all that follows moves."""
    data, _ = sound_tar()
    at, length = any_offset(rng), pick(rng, [1, 7, 512, 1024, 5000])
    added = pick(rng, [bytes(length), rng.bytes(length), data[at : at + length]])
    return Case(data[:at] + added + data[at:], files_at(at, at + 1))


def cut_out(rng: Rng) -> Case:
    """Bytes that are no whole files."""
    data, places = sound_tar()
    starts = {place.start for place in places}
    at = any_offset(rng)
    length = next(n for n in iter(lambda: pick(rng, [1, 100, 512, 1024]), None) if not {at, at + n} <= starts)
    return Case(data[:at] + data[at + length :], files_at(at, at + length))


def double_member(rng: Rng) -> Case:
    members = list(sound())
    number = int(rng.integers(len(members)))
    return Case(tar_of([*members[: number + 1], *members[number:]]))


def strange_members(rng: Rng) -> Case:
    """Links, devices, folders, sparse files and names without a key, anywhere between the files."""
    types = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    types += [tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"Z"]
    members = list(sound())
    strange: dict[str, bytes] = {}
    for i in range(int(rng.integers(1, 4))):
        kind = pick(rng, types)
        name = f"{'ordinary' if kind == tarfile.CONTTYPE else 'x.jpg'}{i}"
        strange[name] = kind
        members.insert(int(rng.integers(len(members) + 1)), (name, b""))

    def header(name: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type = strange.get(name, tarfile.REGTYPE)
        info.linkname = "k-1.png" if name in strange else ""
        return info

    return Case(tar_of(members, header))


def pax_headers(rng: Rng) -> Case:
    """Extended headers before one file: huge, wrong about it, or no headers at all."""
    members = sound()
    victim = int(rng.integers(len(members)))
    name = members[victim][0]
    options = [
        ("comment", "c" * pick(rng, [10, 10**5, 10**6])),
        ("mtime", "yesterday"),
        ("size", pick(rng, ["-1", "x", "99999999999999999999", "7"])),
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.size", "12"),
        ("GNU.sparse.map", "0,1,x"),
        ("hdrcharset", "BINARY"),
        ("charset", "\x00"),
    ]
    pair = pick(rng, options)

    def header(this: str) -> tarfile.TarInfo:
        info = tarfile.TarInfo(this)
        if this == name:
            info.pax_headers = dict([pair])
        return info

    data = bytearray(tar_of(list(members), header))
    if rng.random() < 0.3:  # the numbers in front of its records are wrong as well
        at = data.find(pair[0].encode())
        data[at - 3 : at] = pick(rng, [b"99 ", b"-1 ", b"   ", b"\xff9 ", b"1e3"])
    key, _, extension = name.partition(".")
    return Case(bytes(data), frozenset({(key, extension)}))


def strange_names(rng: Rng) -> Case:
    """All files of one sample under another name; it is read as it stands, and as no other one."""
    old = pick(rng, sorted(by_key(sound())))
    options = [
        "../../etc/passwd", "/absolute", "..", "a/../b", "ü" * 90, "k " * 60, "C:\\k", "-rf", "\u202ek", "%00",
        "x" * 300, "k\nk", "k\\0", "k\0x", "k\udcff\udcfe", "\udced\udca0\udc80",
    ]  # fmt: skip
    new = pick(rng, options)
    members = [(name.replace(old, new) if name.startswith(f"{old}.") else name, data) for name, data in sound()]
    return Case(tar_of(members, tar_format=pick(rng, [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])), renamed=old)
