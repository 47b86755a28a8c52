"""Files that are replaced as a whole: whatever fails, the old content stays and nothing is left beside it."""

from __future__ import annotations

import json
import os

import pytest

from dsmoe_vl.files import publish, replacing, write_atomically, write_json


@pytest.mark.parametrize("before", [None, b"old and longer"])
@pytest.mark.parametrize(("data", "expected"), [(b"\xff\n", b"\xff\n"), ("é\n", b"\xc3\xa9\n"), ("", b"")])
def test_content(tmp_path, before, data, expected):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    write_atomically(path, data)
    assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_json(tmp_path):
    value = {"b": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "file", value)
    assert (tmp_path / "file").read_text() == json.dumps(value)


@pytest.mark.parametrize("error", [KeyError, OSError, KeyboardInterrupt])
def test_an_exception_keeps_the_old_file(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "file", {"value": object()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"new")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "file", b"new")


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    for function in ("fsync", "replace"):
        original = getattr(os, function)
        monkeypatch.setattr(
            os, function, lambda *args, name=function, original=original: (calls.append(name), original(*args))
        )
    (tmp_path / "file.partial").write_bytes(b"new")
    publish(tmp_path / "file.partial", tmp_path / "file")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
