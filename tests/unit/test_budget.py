"""Limits on the size of a sample: the message names the setting, and memory stays bounded without reading the bytes."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import textwrap
import zlib

import pytest

from data_tools.inspect import inspect
from data_tools.synthetic.films import encode_mp4
from dsmoe_vl.config.bounds import out_of_bounds
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples, read_sample
from dsmoe_vl.errors import DataError
from tests.support.loading import DATA, encode
from tests.support.tars import encoded_as, picture, write_tar

MIB = 2**20


def write_sparse(path, *files):
    """A tar of zeros: (name, bytes), files that take no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as tar:
        for name, size in files:
            header = tarfile.TarInfo(name)
            header.size = size
            tar.write(header.tobuf(tarfile.USTAR_FORMAT))
            tar.truncate(tar.tell() + size + -size % 512)
            tar.seek(0, 2)
        tar.truncate(tar.tell() + 1024)
    return path


def png(width, height):
    """A white PNG with alpha, written row by row."""
    packer, row = zlib.compressobj(1), b"\0" + b"\xff" * 4 * width
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 6, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def video(width, height):
    return encode_mp4([picture(width, height)] * 3)


@pytest.mark.parametrize(
    ("extension", "content", "setting", "size", "found"),
    [
        ("txt", b"a" * (MIB + 512), "max_text_mib", 1 + 512 / MIB, "1049088 bytes"),
        ("json", b"{}" + b" " * MIB, "max_text_mib", 1 + 2 / MIB, "1048578 bytes"),
        ("jpg", b"a" * 2 * MIB, "max_media_mib", 2, "2097152 bytes"),
        ("mp4", b"a" * 2 * MIB, "max_media_mib", 2, "2097152 bytes"),
        ("jpg", encoded_as(picture(101, 100), "JPEG"), "max_megapixels", 0.0101, "101 x 100 pixels"),
        ("png", encoded_as(picture(101, 100), "PNG"), "max_megapixels", 0.0101, "101 x 100 pixels"),
        ("webp", encoded_as(picture(101, 100), "WEBP"), "max_megapixels", 0.0101, "101 x 100 pixels"),
        ("mp4", video(128, 96), "max_megapixels", 0.012288, "128 x 96 pixels"),
    ],
)
def test_one_above_a_limit_is_bad_and_one_at_it_is_not(tmp_path, extension, content, setting, size, found):
    write_tar(tmp_path / "a.tar", [(f"k.{extension}", content)])
    limit = 0.99 * size
    with pytest.raises(DataError) as error:
        read_sample(ShardIndex.load(tmp_path, DataConfig(**{setting: limit})), 0, 0)
    assert f" too large: k.{extension}: {found}, more than data.{setting} = {limit:g}" in str(error.value)
    assert str(error.value).endswith("; raise it in the recipe if the sample is right")
    assert read_sample(ShardIndex.load(tmp_path, DataConfig(**{setting: size})), 0, 0).key == "k"


@pytest.mark.parametrize("setting", ["max_text_mib", "max_media_mib", "max_megapixels"])
def test_limits_are_settings_of_the_recipe(setting):
    assert [key for key, _, _ in out_of_bounds(DataConfig(**{setting: 0.0}))] == [setting]
    assert list(out_of_bounds(DataConfig(**{setting: 0.001}))) == []


def test_training_counts_them_and_inspection_lists_them(tmp_path):
    for i in range(12):
        write_sparse(tmp_path / "s" / f"{i:02}.tar", ("a-0-0.jpg", 100), ("a-0-0.txt", 9 * MIB if i == 3 else 4))
    reason = (
        "a-0-0.txt: 9437184 bytes, more than data.max_text_mib = 8 (MiB); raise it in the recipe if the sample is right"
    )
    assert inspect(tmp_path / "s").problems["file too large"] == [f"03.tar, sample 0: {reason}"]
    data = DataConfig(**{**vars(DATA), "lanes": 1, "max_bad_fraction": 1.0})
    loader = Loader(
        data, (SourceConfig("a", str(tmp_path / "s")),), encode, 16, 2, 1, 0, 1, 1, 4, tmp_path / "quarantine.jsonl"
    )
    next(iter(loader))
    report = loader.report()
    assert report["a/errors"] == report["a/errors/file too large"] > 0
    assert (
        json.loads((tmp_path / "quarantine.jsonl").read_text().splitlines()[0])["reason"] == f"file too large: {reason}"
    )


def test_the_header_of_a_picture_that_is_none_is_left_to_the_decoder(tmp_path):
    broken = [encoded_as(picture(), kind)[:20] for kind in ("JPEG", "PNG", "WEBP")] + [
        b"",
        b"\xff\xd8",
        b"RIFF....WEBP",
    ]
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", data) for i, data in enumerate(broken)])
    assert [sample.media for sample in iterate_samples(SourceConfig.at(tmp_path))] == broken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
def test_memory_is_bounded(tmp_path):
    """2 GB of text, 300 MB of JSON, 3 GB of video, 90 megapixels and a long name of 600 MB, in 60 MB of memory."""
    write_sparse(tmp_path / "text" / "a.tar", ("a.jpg", 10), ("a.txt", 2 * 2**30))
    write_sparse(tmp_path / "json" / "a.tar", ("a.jpg", 10), ("a.json", 300 * MIB))
    write_sparse(tmp_path / "video" / "a.tar", ("a.mp4", 3 * 2**30))
    write_tar(tmp_path / "pixels" / "a.tar", [("a.png", png(9000, 10000)), ("a.txt", b"white")])
    assert (tmp_path / "pixels" / "a.tar").stat().st_size < 2 * MIB
    long_name = write_sparse(tmp_path / "name" / "a.tar", ("././@LongLink", 600 * MIB), ("a.jpg", 10))
    with long_name.open("rb+") as tar:  # the type of the first header: a long name
        header = bytearray(tar.read(512))
        header[156:157], header[148:156] = b"L", b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar.seek(0)
        tar.write(header)
    script = textwrap.dedent("""
        import re, sys
        from pathlib import Path
        from dsmoe_vl.data.shards.index import ShardIndex, read_sample
        from dsmoe_vl.errors import DataError

        def mib(name):
            return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

        Path("/proc/self/clear_refs").write_text("5")
        before = mib("VmRSS")
        for name in sys.argv[2:]:
            try:
                read_sample(ShardIndex.load(Path(sys.argv[1]) / name), 0, 0)
            except DataError as error:
                print(name, str(error).split(":")[0])
        print(mib("VmHWM") - before)
    """)
    names = ["text", "json", "video", "pixels", "name"]
    *reasons, grown = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *names], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert reasons == [
        "text file too large", "json file too large", "video file too large", "pixels picture too large",
        "name damaged shard",
    ]  # fmt: skip
    assert float(grown) < 60
