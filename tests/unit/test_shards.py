import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples, read_sample
from dsmoe_vl.data.shards.tar import scan_shard
from dsmoe_vl.errors import DataError
from tests.support.tars import write_index, write_shards, write_tar


def three_samples(prefix: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(3)
        for member in (
            (f"{prefix}{i}.JPG", b"j" * (500 + i)),
            (f"{prefix}{i}.txt", f"é{i}".encode()),
            (f"{prefix}{i}.json", json.dumps({"n": i}).encode()),
            (f"{prefix}{i}.seg.pkl", b"never unpickled"),
        )
    ]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "folder/", "x" * 60 + "/" + "y" * 60 + "/"])
def test_reads_every_tar_dialect(tmp_path: Path, tar_format: int, prefix: str) -> None:
    stray = [("README", b"no extension"), (f"{prefix}.hidden", b"no key")]
    write_tar(tmp_path / "a.tar", [*stray, *three_samples(prefix)], tar_format)
    source = SourceConfig("source", str(tmp_path), tasks=("caption",))
    samples = list(iterate_samples(source))
    assert [sample.key for sample in samples] == [f"{prefix}{i}" for i in range(3)]
    assert [(sample.media, sample.media_type) for sample in samples] == [(b"j" * (500 + i), "jpg") for i in range(3)]
    assert [(sample.text, sample.meta, sample.source) for sample in samples] == [
        (f"é{i}", {"n": i}, source) for i in range(3)
    ]


def test_long_pax_names_and_folders(tmp_path: Path) -> None:
    name = "ü" * 150
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo(f"folder/{name}.jpg"))
        tar.addfile(tarfile.TarInfo(f"folder/{name}.txt"))
    assert [sample.key for sample in iterate_samples(SourceConfig.at(tmp_path))] == [f"folder/{name}"]


def test_reads_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), mtime=0) as writer:
        for i in range(4):
            writer.write({"__key__": f"k{i}", "mp4": b"v" * i, "txt": f"text {i}", "json": {"n": i}})
    samples = list(iterate_samples(SourceConfig.at(tmp_path)))
    assert [(s.key, s.media, s.media_type, s.text, s.meta) for s in samples] == [
        (f"k{i}", b"v" * i, "mp4", f"text {i}", {"n": i}) for i in range(4)
    ]


def test_a_cut_at_any_byte_gives_whole_samples_only(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "whole.tar", three_samples()).read_bytes()
    bounds = scan_shard(tmp_path / "whole.tar").bounds
    end_of_members = int(bounds[-1])
    cut = tmp_path / "cut" / "a.tar"
    cut.parent.mkdir()
    for size in [*range(0, len(data), 131), *range(0, len(data), 512)]:
        cut.write_bytes(data[:size])
        scan = scan_shard(cut)
        np.testing.assert_array_equal(scan.bounds[1:], bounds[1 : len(scan.bounds)])
        if size < end_of_members + 512:
            assert scan.samples < 3
            assert f"truncated at byte {size}" in scan.damage
        else:
            assert (scan.samples, scan.damage) == (3, "")


def test_the_lost_part_of_a_foreign_shard_is_one_bad_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", three_samples())
    path.write_bytes(path.read_bytes()[:8000])
    index = ShardIndex.load(tmp_path)
    assert index.samples == 2
    assert read_sample(index, 0, 0).key == "0"
    with pytest.raises(DataError, match=r"damaged shard: .*a\.tar: truncated at byte 8000; samples from number 1 on"):
        read_sample(index, 0, 1)


def test_overwritten_header_ends_the_scan(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", three_samples())
    data = bytearray(path.read_bytes())
    second = int(scan_shard(path).bounds[1])
    data[second : second + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert scan_shard(path).damage == f"no tar header at byte {second}"


def test_zeroed_header_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", three_samples())
    data = bytearray(path.read_bytes())
    text = int(scan_shard(path).bounds[1]) + 1024  # of the second sample, behind its picture
    data[text : text + 512] = bytes(512)
    path.write_bytes(data)
    scan = scan_shard(path)
    assert (scan.samples, scan.damage) == (1, f"no tar header at byte {text}")


@pytest.mark.parametrize("size", [-1, -512, -(10**6), 2**62, 2**80])
def test_absurd_size_ends_the_scan(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "a.tar", three_samples())
    data = bytearray(path.read_bytes())
    header = int(scan_shard(path).bounds[1])
    field = size.to_bytes(12, "big", signed=True)
    data[header + 124 : header + 136] = bytes([field[0] | 0x80]) + field[1:]
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path.write_bytes(data)
    scan = scan_shard(path)
    # A header that is none may have been one more file of the sample before it.
    assert (scan.samples, scan.damage) == (
        (1, f"truncated at byte {len(data)}") if size > 0 else (0, f"no tar header at byte {header}")
    )


def test_shard_rewritten_under_a_reader(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "a", [3]) / "00000.tar"
    index = ShardIndex.load(tmp_path / "a")
    assert read_sample(index, 0, 1).key == "a-0-1"
    members = [(f"b-{i}.{extension}", b"x") for i in range(3) for extension in ("txt", "json")]
    write_tar(path, [("first.txt", b"x"), *members])
    with pytest.raises(DataError, match="shard changed while it was read"):
        read_sample(index, 0, 1)


def test_texts_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", three_samples())
    samples = list(iterate_samples(SourceConfig.at(tmp_path), media=False))
    assert [(s.key, s.media, s.media_type, s.text, s.meta) for s in samples] == [
        (str(i), None, "", f"é{i}", {"n": i}) for i in range(3)
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b""), ("a.json", b"[1]")], "not an object"),
        ([("a.jpg", b""), ("a.json", b"{")], "malformed text or JSON"),
        ([("a.jpg", b""), ("a.txt", b"\xff\xfe")], "malformed text or JSON"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "repeated key"),
    ],
)
def test_malformed_samples_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        list(iterate_samples(SourceConfig.at(tmp_path)))


def test_manifest_is_checked_against_the_files(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    index = ShardIndex.load(tmp_path)
    assert (index.samples, index.split) == (5, "train")
    with (tmp_path / "00001.tar").open("ab") as tar:
        tar.write(b"\0")
    with pytest.raises(DataError, match=r"00001\.tar has changed since the manifest"):
        ShardIndex.load(tmp_path)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar: named in index\.json but missing"):
        ShardIndex.load(tmp_path)


def test_wrong_sample_count_in_the_manifest(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    write_index(tmp_path, {"00000.tar": 2})
    with pytest.raises(DataError, match=r"has 3 samples, index\.json says 2"):
        read_sample(ShardIndex.load(tmp_path), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is malformed"),
        ("[]", "is malformed"),
        ('{"schema_version": 1, "split": "train"}', "'shards'"),
        ('{"schema_version": 2, "split": "train", "shards": []}', "schema_version is 2"),
        ('{"schema_version": 1, "split": "train", "shards": []}', "no samples"),
        (
            '{"schema_version": 1, "split": "", "shards": [{"name": "../a", "samples": 1, "bytes": 1, "sha256": ""}]}',
            r"not a shard: '\.\./a'",
        ),
    ],
)
def test_malformed_manifest(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=message):
        ShardIndex.load(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ShardIndex.load(tmp_path / "none")
    with pytest.raises(DataError, match=r"no \*\.tar in it; shards are made with"):
        ShardIndex.load(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    index = ShardIndex.load(tmp_path)
    with pytest.raises(DataError, match="truncated at byte 0"):
        read_sample(index, 0, 0)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = ShardIndex.load(write_shards(tmp_path / "a", [3])).fingerprint
    assert ShardIndex.load(tmp_path / "a").fingerprint == first
    assert ShardIndex.load(write_shards(tmp_path / "b", [4])).fingerprint != first


@pytest.mark.parametrize("counts", [[5, 1, 4], [1, 1, 1], [10]])
def test_places_are_all_samples_in_order(tmp_path, counts):
    index = ShardIndex.load(write_shards(tmp_path, counts))
    keys = [sample.key for sample in iterate_samples(SourceConfig.at(tmp_path))]
    assert [read_sample(index, *place).key for place in index.places()] == keys and len(keys) == sum(counts)


def test_a_bad_sample_ends_the_iteration_unless_it_is_taken(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.json", b"{}"), ("1.json", b"{"), ("2.txt", b"\xff"), ("3.txt", b"a")])
    taken: list[tuple[str, int, str]] = []
    samples = iterate_samples(
        SourceConfig.at(tmp_path), failed=lambda shard, number, error: taken.append((shard, number, str(error)[:9]))
    )
    assert [sample.key for sample in samples] == ["0", "3"]
    assert taken == [("a.tar", 1, "malformed"), ("a.tar", 2, "malformed")]
    with pytest.raises(DataError, match="malformed text or JSON"):
        list(iterate_samples(SourceConfig.at(tmp_path)))
