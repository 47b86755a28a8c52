"""What the operating system refuses is one line with the place and what to do, and blocks no later try."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.machine import file_size, limited, small_disk
from tests.support.runs import REPOSITORY, TRAIN, TinyProject, finish, metrics, python, start, two_ranks


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 900) as mounted:
        yield mounted


@pytest.fixture
def pictures(tmp_path):
    """Pictures of 60 KiB with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(noise.integers(0, 256, (144, 144, 3), np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("noise\n")
    return folder


def tool(name, *arguments):
    return python("-m", f"data_tools.{name}", *arguments)


def writers(tiny, pictures, output):
    """Commands that write more than 20 KiB below the new folder `output`, and the first file of their result."""
    counts = ("--images", 100, "--videos", 0, "--eval-images", 4, "--eval-videos", 0)
    images = tiny.data / "images_train"
    return {
        "synthetic": (tool("synthetic", "--output", output, *counts), "images_train/index.json"),
        "convert": (tool("convert", "folder", "--media", pictures, "--output", output), "index.json"),
        "convert in processes": (
            tool("convert", "folder", "--media", pictures, "--output", output, "--samples-per-shard", 2,
                 "--workers", 2), "index.json",
        ),
        "tokenizer": (
            tool("tokenizer", "train", "--data", images, "--vocab-size", 320, "--output", output / "t.model"),
            "t.model",
        ),
        "inspect": (tool("inspect", images, "--contact-sheet", output / "sheet.png"), "sheet.png"),
    }  # fmt: skip


MODULES = {
    "convert": "data_tools.convert",
    "tokenizer": "data_tools.tokenizer.train",
    "inspect": "data_tools.inspect",
}
WRITERS = ("synthetic", "convert", "convert in processes", "tokenizer", "inspect")


def assert_refused(result, *parts):
    """One line, status 2."""
    assert result.status == 2, result.out + result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "Traceback" not in result.err, result.err
    assert all(str(part) in errors[0] for part in parts), errors


@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_file_sizes(tiny, pictures, tmp_path, name):
    command, product = writers(tiny, pictures, tmp_path / "output")[name]
    assert_refused(limited(command, file_size(5000)), tmp_path / "output", "File too large", "ulimit -f")
    assert not (tmp_path / "output" / product).exists()
    again = limited(command)
    assert again.status == 0, again.err
    assert (tmp_path / "output" / product).exists()


@pytest.mark.parametrize("name", ("synthetic", "convert", "tokenizer"))
def test_a_full_disk(tiny, pictures, disk, name):
    command, product = writers(tiny, pictures, disk.folder / "output")[name]
    filler = disk.fill()
    assert_refused(limited(command), disk.folder / "output", "No space left on device", "free some space")
    filler.unlink()
    again = limited(command)
    assert again.status == 0 and (disk.folder / "output" / product).exists(), again.err


@pytest.mark.parametrize("name", ("synthetic", "convert", "tokenizer", "inspect"))
def test_a_file_system_that_is_read_only(tiny, pictures, disk, name):
    command, _ = writers(tiny, pictures, disk.folder / "output")[name]
    disk.remount("ro")
    assert_refused(limited(command), disk.folder / "output", "Read-only file system")


@pytest.mark.parametrize("name", ("convert", "tokenizer", "inspect"))
def test_a_folder_without_permission(tiny, pictures, name):
    """Another user runs the tool, from when it is imported: that user may not be able to read this Python."""
    if os.getuid() != 0:
        pytest.skip("no right to become another user: permissions were not checked")
    with tempfile.TemporaryDirectory() as folder:
        open_to_all, closed = Path(folder), Path(folder, "closed")
        open_to_all.chmod(0o755)
        shutil.copytree(tiny.data / "images_train", open_to_all / "data" / "images_train")
        shutil.copytree(pictures, open_to_all / "pictures")
        closed.mkdir(mode=0o700)
        there = TinyProject(open_to_all)
        _, _, _, *arguments = writers(there, open_to_all / "pictures", closed / "output")[name][0]
        imports = "import encodings.utf_8_sig, importlib, sys, webdataset, tests.support.machine as machine"
        become = f"tool = importlib.import_module('{MODULES[name]}'); machine.as_nobody()"
        command = python("-c", f"{imports}; {become}; sys.exit(tool.main(sys.argv[1:]))", *arguments)
        assert_refused(limited(command), closed, "Permission denied")


@pytest.mark.parametrize("name", ("synthetic", "convert", "tokenizer", "inspect"))
def test_a_name_that_is_too_long(tiny, pictures, tmp_path, name):
    command, _ = writers(tiny, pictures, tmp_path / ("x" * 300))[name]
    assert_refused(limited(command), "File name too long")


def test_too_many_open_files():
    code = """
import resource, sys
from dsmoe_vl.command import run
def command():
    resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))
    files = [open("README.md") for _ in range(10)]
sys.exit(run(command))
"""
    assert_refused(limited(python("-c", code)), "README.md: Too many open files", "ulimit -n")


def test_export_leaves_an_empty_folder(trained, tmp_path):
    command = python("launch/export.py", "--run", trained, "--output", tmp_path / "small")
    assert_refused(limited(command, file_size(20_000)), tmp_path / "small", "File too large")
    assert not list((tmp_path / "small").iterdir())
    assert limited(command).status == 0


def test_evaluation_on_a_full_disk(trained, tiny, disk):
    disk.remount("size=9m")
    run = disk.folder / "run"
    assert limited(["cp", "-r", trained, run]).status == 0
    for old in run.glob("samples/captions*"), run.glob("eval.json"), run.glob("report.html"):  # of another test:
        for path in old:  # what is written over would give its space back
            path.unlink()
    disk.fill()
    command = python("launch/evaluate.py", "--run", run, "--data", tiny.data / "images_eval", "--limit", 2)
    assert_refused(limited(command), run, "No space left on device")
    assert not list(run.glob("*.partial")) and not (run / "report.html").exists()


def test_a_part_of_a_checkpoint_on_a_full_disk_stops_no_later_start(tiny, disk):
    """On two ranks. The same command goes on when there is space."""
    disk.remount("size=500k")
    run = disk.folder / "run"
    arguments = tiny.arguments(run, "run.checkpoint_every=4", "run.steps=6", "run.evaluate_every=0")
    for _ in range(2):
        result = two_ranks(arguments)
        lost = f"{run / 'checkpoints' / 'step_00000004'}/"
        assert f"warning: {lost}" in result.out and "there is no checkpoint of that step, and training" in result.out
        assert_refused(
            result, "error (rank ", run / "checkpoints" / "step_00000006", "No space left", "free some space"
        )
    (run / "checkpoints" / "step_00000002").mkdir()  # as a killed process leaves it
    disk.remount("size=9m")
    result = two_ranks(arguments)
    assert result.status == 0, result.out + result.err
    assert sorted(path.name for path in run.glob("checkpoints/step_*")) == ["step_00000004", "step_00000006"]


def test_a_limit_on_file_sizes_ends_training_with_what_to_do(tiny, tmp_path):
    """PyTorch reports no reason when it cannot write."""
    command = python(TRAIN, *tiny.arguments(tmp_path / "run", "run.steps=2", "run.evaluate_every=0"))
    assert_refused(limited(command, file_size(60_000)), tmp_path / "run", "File too large", "ulimit -f")
    assert finish(start(command), 120).status == 0


@pytest.mark.parametrize(("limit", "workers"), [(3000, 0), (100_000, 1)])
def test_a_limit_on_file_sizes_holds_for_shared_memory_too(tiny, tmp_path, limit, workers):
    """It has no path: the message says what it is of."""
    command = python(TRAIN, *tiny.arguments(tmp_path / "run", f"data.workers={workers}", "run.evaluate_every=0"))
    result = limited(command, file_size(limit))
    assert_refused(result, "shared memory of the data workers", "File too large", "ulimit -f")


def test_training_goes_on_when_the_disk_is_full_for_a_while(tiny, disk):
    """Nothing is lost in metrics.jsonl, and what cannot be written is said once."""
    disk.remount("size=9m")
    run = disk.folder / "run"
    settings = ("run.steps=100000", "run.checkpoint_every=100000", "run.evaluate_every=0", "run.router_every=1")
    process = start(python(TRAIN, *tiny.arguments(run, *settings)))
    limit = threading.Timer(240, process.kill)
    limit.start()
    lines = []

    def read_until(text):
        while text not in (line := process.stdout.readline()):
            lines.append(line)
            assert line, "".join(lines) + process.stderr.read()
        lines.append(line)

    read_until("step 3/")
    filler = disk.fill()
    read_until("warning: metrics.jsonl cannot be written: No space left on device; training goes on without it")
    for _ in range(5):
        read_until("tokens/s")
    filler.unlink()
    for _ in range(3):
        read_until("tokens/s")
    process.send_signal(signal.SIGTERM)
    rest = finish(process)
    limit.cancel()
    assert rest.status == 0, rest.err
    said = "".join(lines) + rest.out
    assert said.count("metrics.jsonl cannot") == 1 and "Traceback" not in rest.err
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 9
    assert [path.name for path in run.glob("checkpoints/step_*")] == [f"step_{steps[-1]:08d}"]


@pytest.fixture(scope="module")
def fifo(tmp_path_factory):
    """A FIFO that nobody writes to, under several names."""
    folder = tmp_path_factory.mktemp("fifos")
    for name in ("x.toml", "x.json", "x.model", "train-00000.tar", "x.png", "index", "plan.json", "list.jsonl"):
        os.mkfifo(folder / name)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda tiny, trained, fifo: python(TRAIN, "--dry-run", "--recipe", fifo / "x.toml"),
        lambda tiny, trained, fifo: python(TRAIN, "--dry-run", "--deepspeed", fifo / "x.json"),
        lambda tiny, trained, fifo: python(
            TRAIN, *tiny.arguments(fifo / "run", f"tokenizer.path={fifo / 'x.model'}", "run.steps=1")
        ),
        lambda tiny, trained, fifo: tool("inspect", tiny.data / "images_eval", "--tokenizer", fifo / "x.model"),
        lambda tiny, trained, fifo: tool("inspect", fifo),
        lambda tiny, trained, fifo: tool("tokenizer", "train", "--data", fifo, "--output", fifo / "new.model"),
        lambda tiny, trained, fifo: tool(
            "convert", "coco", "--images", fifo, "--annotations", fifo / "x.json", "--output", fifo / "shards"
        ),
        lambda tiny, trained, fifo: python(
            "launch/generate.py", "caption", "--run", trained, "--image", fifo / "x.png"
        ),
        lambda tiny, trained, fifo: python(
            "launch/generate.py", "retrieve", "--run", trained, "--media", tiny.data / "images_eval",
            "--text", "a", "--index", fifo / "index",
        ),
        lambda tiny, trained, fifo: python(
            "launch/evaluate.py", "--run", trained, "--data", fifo, "--limit", 1
        ),
    ],
    ids=["recipe", "deepspeed", "tokenizer", "tokenizer of a tool", "shard", "shards of a tool", "annotations",
         "picture", "index", "shards of evaluation"],
)  # fmt: skip
def test_a_fifo_is_refused_before_it_is_opened(tiny, trained, fifo, make):
    result = limited(make(tiny, trained, fifo), seconds=60)
    assert result.status == 2 and "Traceback" not in result.err, result.out + result.err
    assert "FIFO" in result.err or "retrieval" in result.err, result.err


def test_a_plan_that_is_a_fifo(trained, tmp_path):
    run = tmp_path / "run"
    assert limited(["cp", "-r", trained, run]).status == 0
    (run / "plan.json").unlink()
    os.mkfifo(run / "plan.json")
    assert_refused(limited(python("launch/export.py", "--run", run, "--output", tmp_path / "x"), seconds=60), "FIFO")


def test_a_device_is_not_replaced(trained, tmp_path):
    """Written atomically, a result would take the place of the device itself."""
    device = tmp_path / "null"
    os.mkfifo(device)
    image = next(REPOSITORY.glob("docs/images/*.png"))
    command = python("launch/generate.py", "caption", "--run", trained, "--image", image, "--json", device)
    assert_refused(limited(command), device, "FIFO")
    assert device.is_fifo()
