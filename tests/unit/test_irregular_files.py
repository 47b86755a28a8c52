"""FIFOs are named and never waited for, and a picture is replaced as a whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from PIL import Image

from data_tools.convert import main as convert
from data_tools.inspect import main as inspect
from data_tools.recordings import is_recording
from dsmoe_vl.data.media_kind import kind_of_file
from dsmoe_vl.drawing.picture_file import format_of, save_picture
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.inference.media import open_media, recorded, to_sample
from dsmoe_vl.monitor import router
from tests.support.datasets import photo, written
from tests.support.tars import write_tar


@pytest.fixture(autouse=True)
def _no_waiting():
    """Whoever waits for a FIFO is interrupted."""

    def end(*_: object) -> None:
        raise TimeoutError("it waited for a FIFO")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.mp4", "a.gif", "a.flac", "a.dat"])
def test_their_kind_is_found_without_opening_them(tmp_path, name):
    kind_of_file(fifo(tmp_path / name))
    is_recording(tmp_path / name)
    for read in (recorded, lambda path: to_sample(path, "image")):
        with pytest.raises(DataError, match="it is a FIFO, not a regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a", "a.jpg", "a.MOV", "a.dat"])
@pytest.mark.parametrize("column", ["file", "recording"])
def test_in_a_table_it_is_rejected(tmp_path, name, column):
    media = tmp_path / "media"
    fifo(media / name)
    photo(media / "b.jpg")
    columns = f"{column},text" if column == "file" else "file,recording,text"
    row = f"{name},x" if column == "file" else f"b.jpg,{name},x"
    table = written(tmp_path / "t.csv", f"{columns}\n{row}\n" + ("b.jpg,x\n" if column == "file" else "b.jpg,,x\n"))
    options = ["--media", str(media), "--table", str(table), "--output", str(tmp_path / "o"), "--max-rejected", "1"]
    convert(["folder", *options])
    assert "it is a FIFO, not a regular file" in (tmp_path / "o" / "rejected.jsonl").read_text()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_as_a_table(tmp_path, capsys, suffix):
    table = fifo(tmp_path / f"t{suffix}")
    options = ["--media", str(tmp_path), "--table", str(table), "--output", str(tmp_path / "o")]
    assert convert(["folder", *options]) == 2
    assert f"--table {table}: it is a FIFO, not a regular file" in capsys.readouterr().err


def test_in_folders(tmp_path, capsys):
    fifo(tmp_path / "m" / "a.jpg")
    photo(tmp_path / "m" / "b.jpg")
    open_media(str(tmp_path / "m"), None)
    assert "1 not a plain file (a.jpg)" in capsys.readouterr().err
    fifo(tmp_path / "s" / "a.tar")
    assert inspect([str(tmp_path / "s")]) == 2
    assert "it is a FIFO, not a regular file" in capsys.readouterr().err


def test_as_a_contact_sheet(tmp_path, capsys):
    write_tar(tmp_path / "s" / "a.tar", [("a.jpg", photo(tmp_path / "a.jpg").read_bytes()), ("a.txt", b"a dog")])
    for name in ("sheet.jpg", "sheet.png"):
        assert inspect([str(tmp_path / "s"), "--contact-sheet", str(fifo(tmp_path / name))]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"error: {tmp_path / name}: it is a FIFO, not a regular file; name a regular file"


@pytest.mark.parametrize(("form", "name"), [("PNG", "a.png"), ("JPEG", "a.jpg")])
def test_on_a_full_disk_the_old_picture_stays(tmp_path, form, name):
    picture = Image.effect_noise((200, 200), 50)
    (tmp_path / name).write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=name):
            save_picture(picture, tmp_path / name, form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    save_picture(picture, tmp_path / name, form)
    assert Image.open(tmp_path / name).format == form


def test_the_names_of_pictures(tmp_path):
    assert [format_of(Path(name), "--x") for name in ("a.png", "a.JPG", "a.jpeg")] == ["PNG", "JPEG", "JPEG"]
    for name in ("a", "a.gif", "png"):
        with pytest.raises(ConfigError, match=rf"^--x {name}: the name must end in \.png, \.jpg, \.jpeg$"):
            format_of(Path(name), "--x")
    with pytest.raises(ConfigError, match=r"--output .*x\.bad: the name must end in"):
        router._draw(tmp_path, tmp_path / "x.bad")
