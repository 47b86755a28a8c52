"""Programs whose standard streams were closed at the start: they do their work, and no file gets a stream's number."""

from __future__ import annotations

import sys

import pytest

from tests.support.runs import REPOSITORY, TRAIN, finish, python, start

ALL = "<&- >&- 2>&-"


def closed(command: list, streams: str) -> list[str]:
    """The command, started by a shell that closes `streams`."""
    return ["sh", "-c", f'exec "$@" {streams}', "sh", *map(str, command)]


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&-", ALL])
def test_closed_streams_lead_to_the_null_device(tmp_path, streams):
    """Also those of a child process, and what C code writes to descriptor 1 or 2."""
    code = f"""
import os, subprocess, sys
from dsmoe_vl.command import run
def work():
    with open({str(tmp_path / "file")!r}, "w") as file:
        assert file.fileno() > 2, file.fileno()
        print("text"); print("text", file=sys.stderr, flush=True); sys.stdin.read()
        os.write(1, b"raw"); os.write(2, b"raw")
        subprocess.run([sys.executable, "-c", "import sys; print(1); print(2, file=sys.stderr)"], check=True)
    assert open({str(tmp_path / "file")!r}).read() == ""
    open({str(tmp_path / "done")!r}, "w").close()
    return 0
sys.exit(run(work))
"""
    result = finish(start(closed([sys.executable, "-c", code], streams)))
    assert result.status == 0, result.out + result.err
    assert (tmp_path / "done").is_file() and "Traceback" not in result.out + result.err


def programs(tiny, folder):
    """A command of each program, and its exit status: most end with a user's error, which is printed."""
    none, launch = folder / "none", REPOSITORY / "launch"
    return {
        "plan": (python(launch / "plan.py", "--recipe", none, "--deepspeed", none), 2),
        "evaluate": (python(launch / "evaluate.py", "--run", none), 2),
        "generate": (python(launch / "generate.py", "caption", "--run", none, "--image", none), 2),
        "export": (python(launch / "export.py", "--run", none, "--output", folder / "out"), 2),
        "import": (python(launch / "import_hf.py", "--text", none, "--output", folder / "out"), 2),
        "align": (python(launch / "align.py", "--recipe", none, "--output", folder / "out"), 2),
        "doctor": (python(launch / "doctor.py", "objective", "--recipe", none, "--deepspeed", none), 2),
        "convert": (python("-m", "data_tools.convert", "folder", "--media", none, "--output", folder / "s"), 2),
        "inspect": (python("-m", "data_tools.inspect", tiny.data / "images_eval"), 0),
        "tokenizer": (python("-m", "data_tools.tokenizer", "train", "--data", none, "--output", folder / "t"), 2),
        "synthetic": (python("-m", "data_tools.synthetic", "--output", folder / "d", "--images", "-1"), 2),
        "router": (python("-m", "dsmoe_vl.monitor.router", none), 2),
    }


NAMES = "plan evaluate generate export import align doctor convert inspect tokenizer synthetic router"


@pytest.mark.parametrize("name", NAMES.split())
def test_every_program_without_standard_output_and_error(tiny, tmp_path, name):
    command, status = programs(tiny, tmp_path)[name]
    assert finish(start(closed(command, ALL))).status == status
    result = finish(start(closed(command, ">&-")))
    assert result.status == status and "Traceback" not in result.err, result.err
    assert "usage:" not in result.err and result.err.count("error") == (status == 2)


@pytest.mark.parametrize("streams", [">&-", ALL])
def test_training_without_standard_output(tiny, tmp_path, streams):
    run = tmp_path / "run"
    command = python(TRAIN, *tiny.arguments(run, "run.steps=1", "run.checkpoint_every=1", "run.evaluate_every=0"))
    result = finish(start(closed(command, streams)))
    assert result.status == 0 and (run / "checkpoints" / "step_00000001").is_dir(), result.err


def test_an_error_of_training_is_told_without_standard_output(tiny, tmp_path):
    command = python(TRAIN, *tiny.arguments(tmp_path / "run", f"tokenizer.path={tmp_path / 'none'}"))
    result = finish(start(closed(command, ">&-")))
    assert result.status == 2 and str(tmp_path / "none") in result.err and "Traceback" not in result.err
