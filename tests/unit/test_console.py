"""What data say never steers the terminal: every text from a shard, a file name or a server is printed with escapes."""

from __future__ import annotations

import json
import re

import pytest

from data_tools import inspect as inspect_tool
from data_tools.convert import main as convert
from dsmoe_vl.command import run
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.console import one_line, printable
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.download import TransientFailure
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.data.shards.remote import RemoteShards
from dsmoe_vl.data.shards.verify import ShardVerifier
from dsmoe_vl.errors import ConfigError, DataError, FetchError
from dsmoe_vl.evaluation.task_evaluation import print_text
from dsmoe_vl.inference.commands import Outcome, caption_media, print_error
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import media_files, open_media
from dsmoe_vl.inference.token_search import GREEDY
from dsmoe_vl.monitor.run_log import RunLog
from tests.support.tars import encoded_as, picture, write_shards, write_tar
from tests.support.trained import random_run

ATTACKS = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\rb", "\x00", "\x7f", "\x85", "\u2028", "\u202edcba", "\u2066x",
    "\u061c", "\ud83d lone", "line\nbreak",
]  # fmt: skip
PLAIN = [
    "a dog",
    "日本語 😀",
    "\U0001f469\u200d\U0001f680",
    "naïve — “quoted”",
    "نمی\u200cخواهم",
    "a\u00a0b",
    "C:\\x1b",
]
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    assert not STEERING.search(text), repr(text)
    text.encode()  # any terminal could print it
    return text


@pytest.mark.parametrize("text", ATTACKS)
def test_what_steers_a_terminal_becomes_an_escape(text):
    shown = clean(printable(text))
    assert "\n" not in shown and printable(shown) == shown
    assert "\n" not in clean(one_line(text))


def test_escapes_name_the_character():
    assert printable("\x1b[31m\x9b\u202e\ud83d") == "\\x1b[31m\\x9b\\u202e\\ud83d"
    assert printable("a\n\tb") == "a\\x0a\\x09b" and printable("a\n\tb", keep="\n\t") == "a\n\tb"
    assert one_line(" a\n\tb \x1b ") == "a b \\x1b"


@pytest.mark.parametrize("text", PLAIN)
def test_text_stays(text):
    assert printable(text) == text


@pytest.mark.parametrize("kind", [DataError, ConfigError, FetchError])
@pytest.mark.parametrize("text", ATTACKS)
def test_every_message_of_an_error(kind, text, capsys):
    def command() -> int:
        raise kind(f"{text}: cannot be used\nand this")

    assert run(command) == 2
    assert clean(capsys.readouterr().err).endswith(": cannot be used\nand this\n")
    print_error(f"{kind(text)}: {text}")
    assert clean(capsys.readouterr().err).count("\n") == 1


@pytest.mark.parametrize("text", ATTACKS)
def test_evaluation(text, capsys):
    print_text(Sample(text, SourceConfig(), 0, None, "", "", {}), f"generated {text}", f"reference {text}")
    assert clean(capsys.readouterr().out).count("\n") == 3


def test_inspection_and_the_original_in_json(tmp_path, capsys):
    """Keys and captions as they are in tars of others."""
    key = "k\x1b[31m"
    photo = encoded_as(picture(), "PNG")
    write_tar(tmp_path / "a.tar", [(f"{key}.png", photo), (f"{key}.json", json.dumps({"captions": 3}).encode())])
    assert inspect_tool.main([str(tmp_path)]) == 1
    assert "k\\x1b[31m" in clean(capsys.readouterr().out)


def test_names_of_files(tmp_path, capsys):
    """What conversion and search pass over and reject, and where they write."""
    media, odd = tmp_path / "m\x1b[31m", "\x1b[31m\u202e\x07"
    media.mkdir()
    for name, data in (("a", encoded_as(picture(), "JPEG")), ("b", b"no picture")):
        (media / f"{name}{odd}.jpg").write_bytes(data)
        (media / f"{name}{odd}.txt").write_text("a photo")
    for name in (f".hidden{odd}", f"notes{odd}.html", f"alone{odd}.gif"):
        (media / name).write_bytes(b"GIF89a" if name.endswith("gif") else b"<p>")
    output = tmp_path / f"out{odd}"
    arguments = ["folder", "--media", str(media), "--output", str(output), "--max-rejected", "0.5"]
    assert convert(arguments) == 0
    said = capsys.readouterr()
    assert ".hidden\\x1b[31m\\u202e\\x07" in clean(said.out) and "alone\\x1b" in said.out and "out\\x1b" in said.out
    clean(said.err.replace("\r", "").replace("\x1b[A", ""))
    assert convert([*arguments[:4], str(output / "2"), "--max-rejected", "0"]) == 2
    clean(capsys.readouterr().err.replace("\r", "").replace("\x1b[A", ""))
    open_media(str(media), DataConfig())
    assert "notes\\x1b[31m" in clean(capsys.readouterr().err)


def test_warnings_about_shards(tmp_path, capsys):
    write_shards(tmp_path, [1])
    write_tar(tmp_path / "more\x1b[31m.tar", [])
    findings = ShardVerifier({"photos": ShardIndex.load(tmp_path)}, 0).findings()
    log = RunLog.__new__(RunLog)
    log.enabled = True
    for finding in findings:
        log.say(f"warning: {finding}")
    assert "more\\x1b[31m.tar" in clean(capsys.readouterr().out)


def test_generation(tiny, tmp_path, capsys, monkeypatch):
    trained = load_run(random_run(tiny, tmp_path / "run"))
    monkeypatch.setattr("dsmoe_vl.inference.commands.texts", lambda *_: ["a \x1b[31mdog\n"])
    file = tmp_path / "p\x1b[31m\tq.png"
    file.write_bytes(encoded_as(picture(), "PNG"))
    assert caption_media(trained, media_files([file], "image"), 4, GREEDY, tmp_path / "captions.json") == 0
    line = capsys.readouterr().out.removesuffix("\n")
    name, caption = line.split("\t")  # no tab of the name
    assert clean(name).endswith("p\\x1b[31m\\x09q.png") and caption == "a \\x1b[31mdog"
    assert json.loads((tmp_path / "captions.json").read_text()) == [{"file": str(file), "caption": "a \x1b[31mdog\n"}]
    Outcome().failed(str(file), "is \x1b[5m bad")
    assert "is \\x1b[5m bad" in clean(capsys.readouterr().err)


def test_warnings_about_servers(tmp_path, caplog):
    remote = RemoteShards("http://host/\x1b[31m", DataConfig(cache=str(tmp_path), fetch_patience_seconds=0.1))

    def attempt() -> bytes:
        raise TransientFailure("503 \x1b[31mno\r")

    with pytest.raises(FetchError) as error:
        remote._retried("http://host/\x1b[31m/a.tar", attempt)
    assert caplog.records and "503 \\x1b[31mno\\x0d" in clean(caplog.text.replace("\n", " "))
    clean(str(error.value))
