"""Shards: what is written can be read by any WebDataset reader, twice the same, and never by halves."""

from __future__ import annotations

import hashlib
import json

import pytest
import webdataset

from data_tools.writer import ShardWriter, sample_key
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import ShardIndex, iterate_samples
from dsmoe_vl.errors import DataError


def write(folder, count=5, **limits):
    with ShardWriter(folder, "train", **limits) as writer:
        for i in range(count):
            writer.write(
                f"photo-{i}", bytes([i]) * 1000, "jpg", f"caption {i}", {"captions": [f"caption {i}"], "url": None}
            )
    return folder


def test_our_reader_and_webdataset_read_what_was_written(tmp_path):
    folder = write(tmp_path / "shards", samples_per_shard=2)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "index.json", "train-00000.tar", "train-00001.tar", "train-00002.tar",
    ]  # fmt: skip
    index = ShardIndex.load(folder)
    assert [shard.samples for shard in index.shards] == [2, 2, 1]
    for shard in index.shards:
        data = (folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)

    samples = list(iterate_samples(SourceConfig.at(folder)))
    assert [sample.text for sample in samples] == [f"caption {i}" for i in range(5)]
    assert samples[3].media == b"\3" * 1000 and samples[3].media_type == "jpg"
    assert samples[3].meta == {
        "schema_version": 1,
        "split": "train",
        "captions": ["caption 3"],
        "sha256": hashlib.sha256(b"\3" * 1000).hexdigest(),
    }
    urls = [str(folder / shard.name) for shard in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(row["__key__"], row["jpg"], row["txt"].decode(), json.loads(row["json"])) for row in theirs] == [
        (sample.key, sample.media, sample.text, sample.meta) for sample in samples
    ]


def test_shards_end_by_bytes_too(tmp_path):
    index = ShardIndex.load(write(tmp_path, bytes_per_shard=2000))
    assert [shard.samples for shard in index.shards] == [2, 2, 1]


def test_same_samples_same_bytes(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("identifier", ["a/b.jpg", "v 1", "éà", "", "x" * 300])
def test_any_identifier_becomes_a_key_that_survives_the_tar(tmp_path, identifier):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(identifier, b"data", "webp", "text", {"id": identifier})
    (sample,) = iterate_samples(SourceConfig.at(tmp_path))
    assert sample.key == sample_key(identifier)
    assert (sample.media, sample.meta["id"]) == (b"data", identifier)


def test_a_recording_beside_a_picture_and_alone(tmp_path):
    with ShardWriter(tmp_path, "train", bytes_per_shard=2000) as writer:
        writer.write("a", b"picture", "jpg", "a dog", {}, recording=b"sound" * 500, recording_type="flac")
        writer.write("b", None, "", "words", {"transcript": "words"}, recording=b"more", recording_type="opus")
    assert ShardIndex.load(tmp_path).samples == 2 and len(list(tmp_path.glob("*.tar"))) == 2  # its bytes count
    first, second = iterate_samples(SourceConfig.at(tmp_path))
    assert (first.media, first.recording, first.recording_type) == (b"picture", b"sound" * 500, "flac")
    assert first.meta["recording_sha256"] == hashlib.sha256(b"sound" * 500).hexdigest() != first.meta["sha256"]
    assert (second.media, second.recording, second.recording_type) == (None, b"more", "opus")
    assert "sha256" not in second.meta and second.names == ("b.json", "b.opus", "b.txt")
    (theirs,) = webdataset.WebDataset([str(tmp_path / "train-00001.tar")], shardshuffle=False)
    assert theirs["opus"] == b"more"


def test_keys_are_kept_apart(tmp_path):
    assert sample_key("a/b") != sample_key("a.b") != sample_key("a b")
    assert sample_key("000000391895") == "000000391895"
    with pytest.raises(DataError, match="'photo-1'"), ShardWriter(tmp_path, "train") as writer:
        writer.write("photo-1", None, "", "text", {})
        writer.write("photo-1", None, "", "other text", {})


def test_an_exception_publishes_nothing_and_a_rerun_starts_afresh(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, "train", samples_per_shard=1) as writer:
        writer.write("a", None, "", "text", {})
        writer.write("b", None, "", "text", {})
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "train-00007.tar.partial").write_bytes(b"left by a process that was killed")
    write(tmp_path)
    assert len(list(iterate_samples(SourceConfig.at(tmp_path)))) == 5
    assert not list(tmp_path.glob("*.partial"))


def test_existing_shards_are_never_touched(tmp_path):
    before = {path: path.read_bytes() for path in write(tmp_path).iterdir()}
    with pytest.raises(DataError, match="already has shards"):
        ShardWriter(tmp_path, "val")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("split", "samples", "message"), [("train", 0, "0 samples"), ("a/b", 10, "'a/b'"), ("", 10, "''")]
)
def test_bad_arguments(tmp_path, split, samples, message):
    with pytest.raises(DataError, match=message):
        ShardWriter(tmp_path, split, samples_per_shard=samples)


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot make the folder"):
        ShardWriter(tmp_path / "file", "train")
