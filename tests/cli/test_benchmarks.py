"""The benchmarks run and their figures are whole. What they come to is not asserted."""

from __future__ import annotations

import json
import subprocess

from tests.runs import REPOSITORY, finish, python, start

BENCHMARKS = REPOSITORY / "benchmarks"


def figures(script, tiny, folder, *more):
    file = folder / "figures.json"
    command = python(BENCHMARKS / script, "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(), "--json", file)
    result = finish(start([*command, "--steps", "2", *more]))
    assert result.status == 0, result.err
    return json.loads(file.read_text())


def test_train_step(tiny, tmp_path):
    found = figures("train_step.py", tiny, tmp_path, "--micro-batch", "2")
    assert found["ranks"] == 1 and found["tokens_per_second"] > 0 and found["step_over_product_rate"] > 0
    assert found["operators_percent"]


def test_moe_cost(tiny, tmp_path):
    found = figures("moe_cost.py", tiny, tmp_path)
    dense, moe = (found["flops_per_token"][name] for name in ("dense", "moe"))
    assert abs(moe / dense - 1) < 0.01  # the router's part
    assert all(found[name][0] > 0 for name in ("forward_backward_moe_over_dense", "step_l1_over_moe"))


def test_the_gpu_script_is_valid():
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu.sh")], check=True)
