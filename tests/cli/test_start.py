"""What a program does not import when it starts, because it takes seconds."""

from __future__ import annotations

import pytest

from tests.support.runs import REPOSITORY, TRAIN, finish, python, start

_PROGRAM = """
import atexit, runpy, sys
names = {"torch._dynamo", "torch._inductor", "sympy", "deepspeed", "torch"}
atexit.register(lambda: print("imported:", *sorted(names & set(sys.modules))))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LAUNCH = REPOSITORY / "launch"


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "export"])
def test_neither_pytorchs_compiler_nor_deepspeed_where_it_is_not_needed(tiny, trained, tmp_path, command):
    """`training/compiler.py` and `model/without_values.py`. Training takes steps, evaluates and saves."""
    arguments = {
        "train": [TRAIN, *tiny.arguments(tmp_path / "run", "run.steps=2", "run.evaluate_every=1")],
        "evaluate": [LAUNCH / "evaluate.py", "--run", trained, "--limit", "2"],
        "generate": [LAUNCH / "generate.py", "caption", "--run", trained, "--media", tiny.data / "videos_eval"],
        "export": [LAUNCH / "export.py", "--run", trained, "--output", tmp_path / "exported"],
    }[command]
    result = finish(start(python("-c", _PROGRAM, *arguments), cold=True))
    assert result.status == 0, result.err
    found = result.out.split("imported: ")[1].split()
    assert found == (["deepspeed", "torch"] if command == "train" else ["torch"])
