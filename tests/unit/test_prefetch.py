"""Downloads of one remote file: its URL, and what happens when something goes wrong."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dsmoe_vl.data.shards.download import (
    PermanentFailure,
    TransientFailure,
    download,
    file_url,
    is_remote,
    without_query,
)

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("folder", "url"),
    [
        ("http://host/a", "http://host/a/x.tar"),
        ("https://host:1/a/?token=b/c", "https://host:1/a/x.tar?token=b/c"),
        ("s3://bucket/a/", "s3://bucket/a/x.tar"),
        ("pipe:cat a/{} | tee {}", "pipe:cat a/x.tar | tee x.tar"),
    ],
)
def test_files_of_a_folder(folder: str, url: str) -> None:
    assert is_remote(folder)
    assert file_url(folder, "x.tar") == url


def test_names_that_need_quotes() -> None:
    assert file_url("http://host/a", "x y?#.tar") == "http://host/a/x%20y%3F%23.tar"
    for name in ("x y", "$(x)", "a;b", "'", "-rf", ""):
        with pytest.raises(PermanentFailure, match="not a safe name"):
            file_url("pipe:cat {}", name)


def test_local_folders() -> None:
    assert not any(is_remote(path) for path in ("a/b", "/a/b", "a:b", "pipes/a", ""))
    assert without_query("https://host/a?b=c") == "https://host/a"
    assert without_query("pipe:test -e ?") == "pipe:test -e ?"


@pytest.mark.parametrize("size", [None, 100_000])
def test_a_command_writes_a_file(tmp_path: Path, size: int | None) -> None:
    (tmp_path / "a").write_bytes(bytes(range(250)) * 400)
    assert b"".join(download(f"pipe:cat {tmp_path}/a", 10, size)) == bytes(range(250)) * 400


@pytest.mark.parametrize(
    ("command", "failure", "message"),
    [
        ("cat {folder}/none", TransientFailure, r"exit status 1: cat: .*No such file"),
        ("no_such_command", PermanentFailure, r"exit status 127: .*not found"),
        ("echo half; kill -9 $$", TransientFailure, "exit status -9"),
        ("echo half", TransientFailure, "ended after 5 of 10 bytes"),
        ("sleep 100 & echo $! $$ > {folder}/pids; sleep 100", TransientFailure, "no data for 1 s"),
        ("echo $$ > {folder}/pids; exec >&-; sleep 100", TransientFailure, "did not end 1 s after its last byte"),
    ],
)
def test_commands_that_fail(tmp_path: Path, command: str, failure: type[Exception], message: str) -> None:
    with pytest.raises(failure, match=message):
        list(download(f"pipe:{command.format(folder=tmp_path)}", 1, 10))
    pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
    deadline = time.monotonic() + 30
    while any(Path("/proc", pid).exists() for pid in pids):  # whatever the shell has started ends with it
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_reader_that_turns_away_ends_the_command(tmp_path: Path) -> None:
    source = download(f"pipe:echo $$ > {tmp_path}/pid; echo; sleep 100", 10)
    assert next(source) == b"\n"
    source.close()
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_file_system_that_hangs() -> None:
    released = threading.Event()

    class Hanging(MemoryFileSystem):
        protocol = "hanging"

        def _open(self, *_args: object, **_options: object) -> None:
            released.wait()

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    with pytest.raises(TransientFailure, match=r"no data for 0\.1 s"):
        list(download("hanging://a", 0.1))
    released.set()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://none/a", "FileNotFoundError"),
        ("file:///none/a", "FileNotFoundError"),
        ("file:///", "IsADirectoryError"),
        ("nonsense://a", "ValueError: .*nonsense"),
        ("http://host:port/a", "InvalidURL"),
    ],
)
def test_what_will_not_get_better(url: str, message: str) -> None:
    with pytest.raises(PermanentFailure, match=message):
        list(download(url, 10))
