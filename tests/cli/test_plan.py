"""launch/plan.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.planner.resolve import resolve
from tests.support.runs import REPOSITORY, finish, python, start
from tests.support.shipped import named


def plan(*words):
    """Cold: it imports no library that takes long."""
    return finish(start(python(REPOSITORY / "launch/plan.py", *words), cold=True))


def test_a_forecast_and_its_status():
    large, zero3 = REPOSITORY / "launch/recipes/large.toml", REPOSITORY / "ds_configs/moe_zero3.json"
    found = plan("--recipe", large, "--deepspeed", zero3, "--gpus", "64", "--gpu", "h200", "--tokens", "1e12")
    assert found.status == 0 and "1.00 T tokens" in found.out and "fits into 131.32 GiB" in found.out
    small = plan("--recipe", large, "--gpus", "8", "--gpu", "a100")
    assert small.status == 1 and "DOES NOT FIT" in small.out


def test_this_kind_of_cpu():
    found = plan("--recipe", REPOSITORY / "launch/recipes/quickstart.toml", "--gpus", "2", "--gpu", "cpu")
    assert found.status == 0 and "2 x CPU" in found.out and "fp32" in found.out


def test_the_best_settings_are_a_deepspeed_json(tmp_path):
    file = tmp_path / "best.json"
    found = plan("--gpus", "16", "--search", "--packs", "64", "--write", file)
    assert found.status == 0 and "why the first" in found.out
    planned = resolve(named("base"), load_deepspeed(file), 16, device="cuda", bf16_unit=True, strict=True)
    assert planned.packs_per_step == 64 and json.loads(file.read_text())["optimizer"]["type"] == "AdamW"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h300"], "--gpu h300"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--gpus", "8", "--packs", "9"], "--packs 9: give a multiple of 8 ranks"),
        (["--tokens", "-1"], "--tokens -1"),
        (["--tokens", "inf"], "--tokens inf: give a number above 0, such as 1e12"),
        (["--cluster", "none.toml"], "cluster file none.toml cannot be read"),
        (["--gpus", "4096"], "data.lanes = 512"),
        (["--search", "--gpu", "a100", "data.pack_patches=67108864"], "nothing fits into"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix(words, message):
    found = plan(*words)
    assert found.status == 2 and found.err.startswith("error: ") and found.err.count("\n") == 1 and message in found.err


def test_a_search_imports_neither_torch_nor_numpy():
    code = (
        "import runpy, sys; sys.argv = ['plan.py', '--search']\n"
        "try: runpy.run_path('launch/plan.py', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "sys.exit(status or bool({'torch', 'numpy', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, stdout=subprocess.DEVNULL, timeout=60
    )
    assert done.returncode == 0
