"""The data tools as commands: a path from nothing to inspected shards, exit statuses, and one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from PIL import Image

from data_tools import convert, inspect
from data_tools.synthetic import generate as synthetic
from data_tools.tokenizer import train as tokenizer
from dsmoe_vl.data.tokenizer import Tokenizer
from tests.conftest import REPOSITORY


def tool(name, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"data_tools.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def succeed(name, *arguments):
    result = tool(name, *arguments)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "new" / "synthetic"
    counts = ("--images", 40, "--videos", 8, "--eval-images", 10, "--eval-videos", 0)
    output = succeed("synthetic", "--output", folder, *counts)
    assert "wrote 40 + 10 images and 8 + 0 videos" in output
    return folder


def test_from_nothing_to_a_tokenizer_and_a_contact_sheet(world, tmp_path):
    output = succeed(
        "tokenizer", "train", "--data", world / "images_train", world / "videos_train", "--output", tmp_path / "t.model"
    )
    assert Tokenizer(tmp_path / "t.model").sha256 in output
    output = succeed("inspect", world / "videos_train", "--contact-sheet", tmp_path / "sheets" / "videos.png")
    assert "8 samples read" in output and "no problems" in output
    assert Image.open(tmp_path / "sheets" / "videos.png").width > 1000


def test_coco_to_shards(shared_data, tmp_path):
    coco = shared_data / "coco_cc_by"
    annotations = coco / "annotations" / "captions_val2017.json"
    output = succeed(
        "convert", "coco", "--images", coco / "val2017", "--annotations", annotations,
        "--output", tmp_path / "val", "--split", "val", "--samples-per-shard", 10,
    )  # fmt: skip
    assert "wrote 25 samples" in output and "rejected: none" in output
    assert sorted(path.name for path in (tmp_path / "val").iterdir()) == [
        "index.json", "val-00000.tar", "val-00001.tar", "val-00002.tar",
    ]  # fmt: skip
    assert "25 samples read, 3 shards" in succeed("inspect", tmp_path / "val")


def test_inspect_fails_on_damage(world, tmp_path):
    (tmp_path / "cut.tar").write_bytes((world / "images_train" / "train-00000.tar").read_bytes()[:50_000])
    result = tool("inspect", tmp_path)
    assert result.returncode == 1 and result.stderr == ""
    assert "problem: 1 x damaged shard" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetic", "--output", "{tmp}", "--size", 50], "--size 50"),
        (
            ["convert", "coco", "--images", "{tmp}", "--annotations", "{tmp}/a.json", "--output", "{tmp}/s"],
            "No such file",
        ),
        (["convert", "folder", "--media", "{tmp}", "--table", "{tmp}/a.txt", "--output", "{tmp}/s"], "must end in"),
        (
            ["tokenizer", "train", "--data", "{tmp}", "--output", "{tmp}/t.model"],
            "no *.tar in it; shards are made with",
        ),
        (["inspect", "{tmp}/gone"], "no such folder"),
        (["inspect", "{tmp}", "--contact-sheet", "sheet.pdf"], "must end in .png"),
    ],
)
def test_a_user_error_is_one_line_and_status_2(tmp_path, arguments, message):
    result = tool(*(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (convert, [], ["coco", "folder", "tvsum"]),
        (convert, ["coco"], ["captions_train2017.json", "python -m data_tools.convert coco", "--max-rejected"]),
        (convert, ["folder"], ["texts.csv", "python -m data_tools.convert folder", "--map"]),
        (tokenizer, ["train"], ["python -m data_tools.tokenizer train", "--vocab-size"]),
        (synthetic, [], ["--eval-videos", "8000"]),
        (inspect, [], ["--contact-sheet", "exit status"]),
    ],
)
def test_help_shows_layout_and_example(module, arguments, words, capsys):
    with pytest.raises(SystemExit, match="0"):
        module.main([*arguments, "--help"])
    output = capsys.readouterr().out
    assert all(word in output for word in words)
