"""Shards as other tools pack them: the message names what was found and the rule, not what it led to."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import numpy as np
import pytest

from data_tools.formats import img2dataset
from data_tools.inspect import inspect
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.contents import contents_of, media_of
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import EXTENSIONS, split_name
from dsmoe_vl.data.shards.index import ShardIndex, _cached_scan, iterate_samples, read_sample
from dsmoe_vl.errors import DataError
from dsmoe_vl.tasks.caption import chosen_caption
from tests.support.datasets import read as from_datasets
from tests.support.loading import DATA, encode
from tests.support.tars import encoded_as, picture, write_tar

PHOTO = encoded_as(picture(), "JPEG")
TEXT = b"a dog"
META = json.dumps({"captions": ["a dog"]}).encode()
NO_MEDIA = "no image or video: none of KEY.jpg, KEY.jpeg, KEY.png, KEY.webp, KEY.mp4, KEY.webm, KEY.mkv, KEY.avi; "
NO_TEXT = "no caption: no text in `captions` or `caption` of KEY.json, nor in KEY.txt; "
DOT = "a name is KEY.EXTENSION, the key up to the first dot, so put no other dot into names"
APART = "has files elsewhere in the tar: files of one sample must follow each other in the tar"


def first_problem(folder):
    """What inspection says of the first sample, without its place."""
    problems = inspect(folder).problems
    kind, places = next((kind, places) for kind, places in problems.items() if kind.startswith("no "))
    return f"{kind}: {places[0].split(': ', 1)[1]}"


def trained(folder, quarantine):
    """The first reason in the list of bad samples, and the message that ends the run."""

    def needs_all(sample):
        media_of(sample), chosen_caption(sample)
        return encode(sample)

    data = DataConfig(**{**vars(DATA), "max_bad_fraction": 0.0})
    loader = Loader(data, (SourceConfig("a", str(folder)),), needs_all, 16, 2, 1, 0, 1, 1, 1, quarantine)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    return json.loads(quarantine.read_text().splitlines()[0])["reason"], str(error.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(f"1.0{i}.{extension}", data) for i in range(5) for extension, data in [("jpg", PHOTO), ("txt", TEXT)]],
         NO_MEDIA + "1 has the files 1.00.jpg, 1.00.txt, 1.01.jpg, 1.01.txt, 1.02.jpg, 1.02.txt, ... (10 in all); "
         "1.00.jpg is the file 00.jpg of 1: " + DOT),
        ([("x.input.jpg", PHOTO), ("x.txt", TEXT)],
         NO_MEDIA + "x has the files x.input.jpg, x.txt; x.input.jpg is the file input.jpg of x: " + DOT),
        ([("x.jpg", PHOTO), ("x.caption.txt", TEXT)],
         NO_TEXT + "x has the files x.jpg, x.caption.txt; x.caption.txt is the file caption.txt of x: " + DOT),
        ([("x.jpg", PHOTO), ("x.meta.json", META)],
         NO_TEXT + "x has the files x.jpg, x.meta.json; x.meta.json is the file meta.json of x: " + DOT),
        ([("x.jpg", PHOTO), ("x.json.gz", gzip.compress(META))],
         NO_TEXT + "x has the files x.jpg, x.json.gz; x.json.gz is compressed a second time: store it as x.json"),
        ([("x.jpg", PHOTO), ("x.TXT.bz2", bz2.compress(TEXT))],
         NO_TEXT + "x has the files x.jpg, x.TXT.bz2; x.TXT.bz2 is compressed a second time: store it as x.TXT"),
        ([(f"{i}.jpg", PHOTO) for i in range(3)] + [(f"{i}.txt", TEXT) for i in range(3)],
         NO_TEXT + f"0 has the files 0.jpg; 0 {APART}"),
        ([(f"{i}.txt", TEXT) for i in range(3)] + [(f"{i}.jpg", PHOTO) for i in range(3)],
         NO_MEDIA + f"0 has the files 0.txt; 0 {APART}"),
        ([("images/0.jpg", PHOTO), ("texts/0.txt", TEXT)], NO_TEXT + "images/0 has the files images/0.jpg"),
        ([("x.gif", PHOTO), ("x.txt", TEXT)], NO_MEDIA + "x has the files x.gif, x.txt"),
        ([("x.jpg", PHOTO), ("x.cls", b"3")], NO_TEXT + "x has the files x.jpg, x.cls"),
        ([("x.jpg", PHOTO), ("x.json", b'{"text": "a dog", "url": ""}')],
         "no caption: no text in `captions` or `caption` of KEY.json (it has text, url), nor in KEY.txt; "
         "x has the files x.jpg, x.json"),
    ],
)  # fmt: skip
def test_cause_of_a_bad_sample(tmp_path, members, message):
    write_tar(tmp_path / "s" / "a.tar", members)
    assert first_problem(tmp_path / "s") == message
    reason, end = trained(tmp_path / "s", tmp_path / "quarantine.jsonl")
    assert reason in {f"{kind}: {place.split(': ', 1)[1]}" for kind, places in inspect(tmp_path / "s").problems.items()
                      for place in places if ": " in place} and reason in end  # fmt: skip


def test_a_key_of_two_whole_samples_is_no_cause(tmp_path):
    members = [("a.jpg", PHOTO), ("a.txt", TEXT), ("b.jpg", PHOTO), ("a.jpg", PHOTO), ("a.txt", TEXT)]
    write_tar(tmp_path / "a.tar", members)
    assert "elsewhere" not in first_problem(tmp_path)
    assert [contents_of(sample).problems[:1] for sample in iterate_samples(SourceConfig.at(tmp_path))][::2] == [(), ()]


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (gzip.compress, "compressed with gzip: unpack it"),
        (bz2.compress, "compressed with bzip2: unpack it"),
        (lzma.compress, "compressed with xz: unpack it"),
        (lambda data: b"\x28\xb5\x2f\xfd" + data, "compressed with zstd: unpack it"),
        (lambda data: b"PK\x03\x04" + data, "a zip archive: shards are tars"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ],
)
def test_a_shard_that_is_no_plain_tar(tmp_path, packed, message):
    tar = write_tar(tmp_path / "s" / "a.tar", [("x.jpg", PHOTO), ("x.txt", TEXT)])
    tar.write_bytes(packed(tar.read_bytes()))
    _cached_scan.cache_clear()
    (place,) = inspect(tmp_path / "s").problems["damaged shard"]
    assert place.startswith(f"a.tar: {message}")
    reason, end = trained(tmp_path / "s", tmp_path / "quarantine.jsonl")
    assert message in reason and message in end


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ([], ""),
        (["a.tar.gz"], "; unpack a.tar.gz to plain tars"),
        (["a.tgz", "b.TAR.ZST"], "; unpack a.tgz, b.TAR.ZST to plain tars"),
        (["A.TAR", "B.Tar"], "; rename A.TAR, B.Tar to *.tar, in small letters"),
        (["a.zip"], "; unpack a.zip and make shards of the files with `python -m data_tools.convert folder`"),
        (["x/a.tar", "y/b.tar"], "; tars are in the folders x, y: name one of them, or move the tars together"),
        (
            ["A.TAR", "x/a.tar"],
            "; rename A.TAR to *.tar, in small letters; tars are in the folders x: name one of them",
        ),
    ],
)
def test_a_folder_without_tars(tmp_path, names, hint):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for read in (ShardIndex.load, inspect, converted):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no *.tar in it{hint}")):
            read(tmp_path)


def test_no_folder(tmp_path):
    (tmp_path / "a.tar").touch()
    for read in (inspect, converted):
        with pytest.raises(DataError, match=r"a\.tar: (a file; name the folder|no such folder)"):
            read(tmp_path / "a.tar")
        with pytest.raises(DataError, match="gone: no such folder"):
            read(tmp_path / "gone")


def converted(folder):
    return from_datasets(img2dataset, "--shards", folder)


@pytest.mark.parametrize("names", [["1", "2"], ["images/1", ".hidden.jpg"]])
def test_names_without_an_extension(tmp_path, names):
    write_tar(tmp_path / "a.tar", [(name, PHOTO) for name in names])
    rule = f"{names[0]} belongs to none; a name is KEY.EXTENSION, the key up to the first dot"
    assert inspect(tmp_path).problems == {"no samples": [f"a.tar: {rule}"]}
    with pytest.raises(DataError, match=f"no samples in its shards: {rule}"):
        ShardIndex.load(tmp_path)


def test_several_media_of_one_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", PHOTO), ("a.png", encoded_as(picture(), "PNG")), ("a.txt", TEXT)])
    assert inspect(tmp_path).problems == {
        "several images or videos": ["a.tar, sample 0, a: a.jpg, a.png; only a.jpg is used"]
    }
    (sample,) = iterate_samples(SourceConfig.at(tmp_path))
    assert sample.media == PHOTO


def test_random_names(tmp_path):
    """A sample is used, or the reason lists its files; and reading without media says the same of the texts."""
    rng = np.random.default_rng(0)
    parts = ["a", "b", "1", "05", "_", "é", "\x1b[31m", "", " "]
    ends = [*EXTENSIONS, "JPG", "gif", "json.gz", "txt.xz", "seg.png", "", "x.y.z"]
    contents = {"jpg": PHOTO, "txt": TEXT, "json": META}
    seen = {"used": 0, "no media": 0, "no caption": 0, "error": 0}
    for number in range(300):
        members = []
        keys = [".".join(str(rng.choice(parts)) for _ in range(rng.integers(1, 3))) for _ in range(2)]
        for _ in range(rng.integers(2, 9)):
            name = str(rng.choice(["", "", "d/"])) + str(rng.choice(keys)) + "." + str(rng.choice(ends))
            members.append((name, contents.get(name.rpartition(".")[2].lower(), PHOTO)))
        if rng.random() < 0.5:
            members.sort()
        folder = tmp_path / str(number)
        write_tar(folder / "a.tar", members)
        try:
            index = ShardIndex.load(folder)
        except DataError as error:
            assert "belongs to none" in str(error) and not any(split_name(name)[0] for name, _ in members)
            continue
        found = []
        for i in range(index.samples):
            try:
                sample = read_sample(index, 0, i)
            except DataError as error:
                assert str(error).startswith("repeated key: ")
                seen["error"] += 1
                found.append(None)
                continue
            found.append(sample)
            assert {split_name(name)[0] for name in sample.names} == {sample.key}
            known = contents_of(sample)
            assert known.no_caption == contents_of(read_sample(index, 0, i, media=False)).no_caption
            for what, reason in (("no media", known.no_media), ("no caption", known.no_caption)):
                if reason:
                    seen[what] += 1
                    assert all(name in reason for name in sample.names[:6])
                    dotted = [name for name in sample.names if "." in (end := split_name(name)[1])
                              and end.rpartition(".")[2] in EXTENSIONS]  # fmt: skip
                    assert not dotted or "put no other dot" in reason or "second time" in reason
            seen["used"] += not (known.no_media or known.no_caption)
        read = [sample.key for sample in found if sample]
        for sample in found:
            if sample and read.count(sample.key) > 1:
                assert "elsewhere" in sample.habit
        listed = [name for sample in found if sample for name in sample.names]
        if None not in found:
            assert sorted(listed) == sorted(name for name, _ in members if split_name(name)[0])
    assert min(seen.values()) > 10, seen
