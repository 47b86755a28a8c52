"""The benchmarks run and their figures are whole. What they come to is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.runs import REPOSITORY, finish, python, start

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


def test_monitoring(tiny, tmp_path):
    found = figures("monitoring.py", tiny, tmp_path, "run.router_every=2")
    assert found["pairs"] == 2 and len(found["watched_over_bare"]) == 3
    assert all(found[f"{part}_ms"] > 0 for part in ("step", "adding_up", "log_line", "router_record"))


def test_data(tmp_path):
    file = tmp_path / "figures.json"
    command = python(BENCHMARKS / "data.py", "--samples", "32", "--workers", "1", "--repeats", "1", "--json", file)
    result = finish(start(command))
    assert result.status == 0, result.err
    found = json.loads(file.read_text())
    assert all(value > 0 for value in found["ratios"].values()) and len(found["rates"]) == 7


def test_the_catalogue_is_the_same_every_time(tmp_path):
    command = "import sys, pathlib, catalogue; catalogue.make(pathlib.Path(sys.argv[1]))"
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", command, tmp_path / name], cwd=BENCHMARKS, check=True)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.tar"))
    assert len(files) == 18
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_generate(tiny, tmp_path):
    """The three ways write the same tokens, or the benchmark fails."""
    file = tmp_path / "figures.json"
    command = python(BENCHMARKS / "generate.py", "--recipe", tiny.recipe, "--batch", "2", "--max-tokens", "4")
    result = finish(start([*command, "--repeats", "2", "--json", file]))
    assert result.status == 0, result.err
    found = json.loads(file.read_text())
    assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2, 2] and len(found["ratios"]) == 2


def test_the_gpu_script_is_valid():
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu.sh")], check=True)
