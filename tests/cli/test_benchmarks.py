"""The benchmarks run and their figures are whole. What they come to is not asserted."""

from __future__ import annotations

import json
import subprocess

import numpy as np
from PIL import Image

from benchmarks.record import Result
from benchmarks.results_tables import quickstart_output
from benchmarks.summary import BLOCKS
from tests.distributed.ranks import cpu_environment
from tests.support.runs import REPOSITORY, finish, python, start
from tests.support.trained import random_run
from tests.support.warm import popen

BENCHMARKS = REPOSITORY / "benchmarks"


def measured(command, folder, *more, cold=False):
    """The result file of a benchmark, which its tables accept. `cold`: for one that measures its own memory."""
    file = folder / "result.json"
    result = finish(start([*command, "--json", file, *more], cold))
    assert result.status == 0, result.err
    found = Result.read(file)
    assert found.date and found.machine.cores and {"python", "torch", "deepspeed"} <= set(found.versions)
    assert "result.json" not in found.command
    for block in BLOCKS.values():
        block({found.benchmark: [found]})
    return found


def steps(script, tiny, folder, *more):
    """The figures of a benchmark of two steps."""
    command = python(BENCHMARKS / script, "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(), "--steps", "2")
    found = measured(command, folder, *more)
    assert f"benchmarks/{script} --recipe .../tiny.toml --deepspeed .../zero2.json --steps 2" in found.command
    return found.figures


def test_train_step(tiny, tmp_path):
    found = steps("train_step.py", tiny, tmp_path, "--micro-batch", "2")
    assert found["recipe"] == "tiny" and found["ranks"] == 1 and found["micro_batch"] == 2
    assert found["tokens_per_second"] > 0 and found["step_over_product_rate"] > 0 and found["operators_percent"]


def test_train_peer(tmp_path):
    """Both sides have the same first loss, or the benchmark fails."""
    found = measured(python(BENCHMARKS / "train_peer.py", "--steps", "1"), tmp_path).figures
    assert found["form"] in ("grouped_mm", "eager") and found["first_loss"] > 0
    assert min(found["tokens_per_second"].values()) > 0 and found["ours_over_transformers"][0] > 0


def test_moe_cost(tiny, tmp_path):
    found = steps("moe_cost.py", tiny, tmp_path)
    dense, moe = (found["flops_per_token"][name] for name in ("dense", "moe"))
    assert abs(moe / dense - 1) < 0.01  # the router's part
    assert all(found[name][0] > 0 for name in ("forward_backward_moe_over_dense", "step_l1_over_moe"))


def test_moe_layer(tmp_path):
    """All layers of a shape agree, or the benchmark fails."""
    command = python(BENCHMARKS / "moe_layer.py", "--tokens", "64", "--turns", "1")
    found = measured(command, tmp_path).figures["layers"]
    assert [(layer["shape"], layer["tokens"]) for layer in found] == [("coarse", 64), ("fine", 64)]
    for layer in found:
        assert len(layer["paths"]) == 7 and layer["paths"]["dense"]["over_dense"] == [1, 1, 1]
        for path in layer["paths"].values():
            assert path["tflops_per_rank"] > 0 and path.get("tokens_agreeing", 1) == 1


def test_traffic(tmp_path):
    """Without a GPU; the bytes are what the operators say, so here figures are asserted."""
    found = measured(python(BENCHMARKS / "traffic.py"), tmp_path).figures["layers"]
    over = {(layer["shape"], layer["tokens"]): layer["bytes"] / layer["least"] for layer in found}
    assert all(ratio > 1 for ratio in over.values())
    assert all(ratio <= 1.3 for (shape, _), ratio in over.items() if shape != "fine, narrow"), over


def test_growth(tmp_path):
    options = (
        "--steps",
        "1",
        "--rounds",
        "1",
        "--points",
        "1",
        "--curves",
        "frames of a video, in packs of 1,536 tokens",
    )
    (points,) = measured(python(BENCHMARKS / "growth.py"), tmp_path, *options).figures["curves"].values()
    assert points[0]["seconds"] > 0 and points[0]["expected"] > 0


def test_packing(tiny, tmp_path):
    """Both forms of a step have the same loss, or the benchmark fails."""
    options = ("--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed(), "--turns", "1")
    command = python(BENCHMARKS / "packing.py", *options, "tasks.retrieval.weight=1", "tasks.summary.weight=1")
    found = measured(command, tmp_path).figures
    assert found["packed"]["real_share"] > found["padded"]["real_share"] > 0
    assert found["packed"]["tokens_a_step"] == 256 and found["packed_over_padded"][0] > 0


def test_checkpoint(tmp_path):
    small = (
        "model.width=64", "model.heads=4", "model.kv_heads=2", "model.ffn_width=64", "model.vision.width=32",
        "model.vision.heads=2", "model.vision.ffn_width=32", "moe.experts=4", "moe.top_k=2", "moe.ffn_width=32",
        "tokenizer.vocab_size=512",
    )  # fmt: skip
    command = python(BENCHMARKS / "checkpoint.py", "--folder", tmp_path, *small)
    found = measured(command, tmp_path, cold=True).figures["of_ranks"]
    assert len(found) == 1 and found[0]["bytes"] > 0 and found[0]["write_over_plain"] > 0
    assert {"starting", "loading"} < set(found[0]["peak_over_kept"])
    assert not list(tmp_path.glob("checkpoint_benchmark*"))


def test_import_model(tmp_path):
    command = python(BENCHMARKS / "import_model.py", "--parameters", "0.15", "--files", "2", "--folder", tmp_path)
    found = measured(command, tmp_path, cold=True).figures
    assert found["layers"] == 1 and found["peak_bytes"] < 1.2 * found["largest_file_bytes"] + found["layer_bytes"]
    assert len(found["plan_seconds"]) == 5 and list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_large(tiny, tmp_path):
    small = (
        "model.width=64", "model.heads=4", "model.kv_heads=2", "model.head_width=0", "model.ffn_width=64",
        "model.vision.width=32", "model.vision.heads=2", "model.vision.ffn_width=32", "moe.experts=4", "moe.top_k=2",
        "moe.ffn_width=32", f'data.sources=[{{name="images", path="{tiny.data}/images_train"}}]',
        f"tokenizer.path={tiny.data}/tokenizer.model",
    )  # fmt: skip
    found = measured(python(BENCHMARKS / "large.py"), tmp_path, *small, cold=True).figures
    assert len(found["losses"]) == 5 and found["zero_stage"] == 3 and found["world_size"] == 2
    assert all(0.3 < peak < 10 for peak in found["peak_gib"].values())


def test_parting(tmp_path):
    command = python(BENCHMARKS / "parting.py", "--seeds", "1", "--steps", "4")
    found = measured(command, tmp_path).figures["curves"]
    first = {way: points[0]["cosine"] for way, (points,) in found.items()}
    assert list(first) == ["copies", "noise 0.01", "noise 0.1", "fresh share 0.5"]
    assert abs(first["copies"] - 1) < 1e-5 and first["copies"] > first["noise 0.1"] > first["fresh share 0.5"] > 0
    assert all(points[-1]["cosine"] < points[0]["cosine"] for (points,) in found.values())


def test_monitoring(tiny, tmp_path):
    found = steps("monitoring.py", tiny, tmp_path, "run.router_every=2")
    assert found["pairs"] == 2 and len(found["watched_over_bare"]) == 3
    assert all(found[f"{part}_ms"] > 0 for part in ("step", "adding_up", "log_line", "router_record"))


def test_data(tmp_path):
    command = python(BENCHMARKS / "data.py", "--samples", "32", "--workers", "1", "--repeats", "1")
    found = measured(command, tmp_path).figures
    assert found["photos"] == 32 and len(found["rates"]) == 7
    names = ("loader_over_webdataset", "loader_over_decoding", "converter_over_loop", "psnr_db", "resume_seconds")
    assert all(found[name] > 0 for name in names)


def test_sizes(tmp_path):
    found = measured(python(BENCHMARKS / "sizes.py"), tmp_path).figures
    assert list(found)[-1] == "large" and found["quickstart"]["active_parameters"] < found["quickstart"]["parameters"]


def test_recipes_takes_a_run_and_what_was_printed(tiny, tmp_path):
    run, log = random_run(tiny, tmp_path / "run"), tmp_path / "log.txt"
    lines = [
        {"step": 0, "eval_loss": 6.5},
        {"step": 4, "step_ms": 100.0, "tokens_per_second": 10.0, "real_tokens": 0.9},
        {"step": 6, "step_ms": 50.0, "tokens_per_second": 20.0, "real_tokens": 0.6},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"with_truth": 8, "attribute_accuracy": 0.5}
    (run / "eval.json").write_text(
        json.dumps({f"data/{name}_eval": {"caption": scores} for name in ("images", "videos")})
    )
    printed = [
        *(f"step {n}/6  loss 1  0:0{6 - n} left" for n in (2, 4, 6)),
        "saved step_6",
        "image",
        "generated",
        "reference",
    ]
    counts = [f"{n} of 8 captions name every colour" for n in (3, 4)]
    log.write_text(
        "\n".join(["setup: done", "[2026-01-01] DeepSpeed", *printed[:2], "[2026] warning", *printed[2:], *counts])
    )
    command = python(BENCHMARKS / "recipes.py", "quickstart", "--run", run, "--log", log, "--commit", "0123abc")
    found = measured(command, tmp_path)
    assert (found.benchmark, found.command, found.commit) == ("quickstart", "bash launch/quickstart.sh", "0123abc")
    assert found.figures["steps"] == 6 and found.figures["step_seconds"] == 0.5 and found.figures["seconds"] is None
    assert abs(found.figures["real_tokens"] - 0.8) < 1e-9 and found.figures["output"] == [*printed, *counts]
    text = quickstart_output({"quickstart": [found]})
    shown = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert shown == [*printed[:4], "...", *printed[4:], counts[0], "...", counts[1]]


def test_the_catalogue_is_the_same_every_time(tmp_path):
    """A quarter of it, in shards of as many samples."""
    command = "import sys, pathlib, catalogue as c; c.ARTICLES = 256; c.make(pathlib.Path(sys.argv[1]))"
    # Cold: each has its own seed of hashes, and so its own order of sets.
    made = [popen(python("-c", command, tmp_path / name), cold=True, cwd=BENCHMARKS) for name in ("a", "b")]
    assert [process.wait() for process in made] == [0, 0]
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.tar"))
    assert len(files) == 4 + 1
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_generate(tiny, tmp_path):
    """The three ways write the same tokens, or the benchmark fails."""
    command = python(BENCHMARKS / "generate.py", "--recipe", tiny.recipe, "--batch", "2", "--max-tokens", "4")
    found = measured(command, tmp_path, "--repeats", "2").figures
    assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2, 2] and len(found["ratios"]) == 2


def noise_pictures(folder):
    """Options of a benchmark: pictures of noise with texts of noise."""
    noise, pictures = np.random.default_rng(0), folder / "pictures"
    pictures.mkdir()
    words = ["".join(noise.choice(list("abcdefghijklmnop"), 7)) for _ in range(600)]
    for part, count in (("train", 120), ("test", 6)):
        rows = []
        for number in range(count):
            name = f"{part}{number}.png"
            Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(pictures / name)
            rows.append(f"{name},{' '.join(noise.choice(words, 5))},{number}")
        (pictures / f"{part}.csv").write_text("\n".join(["file,text,content", *rows]))
    return "--pictures", pictures, "--shards", folder / "shards"


def test_learning(tmp_path):
    variants = ("--pairs", "330", "--seeds", "1", "--variants", "together", "plain dual encoder")
    found = measured(python(BENCHMARKS / "learning.py", *noise_pictures(tmp_path), *variants), tmp_path).figures
    ours, plain = (seeds[0] for seeds in found["curves"].values())
    assert [point["pairs"] for point in plain] == [110 * step for step in range(1, 4)]
    assert len(ours) == 3 and 300 < ours[-1]["pairs"] < 360 and ours[-1]["seconds"] > ours[0]["seconds"] > 0
    assert {"text_to_media_r1", "media_to_text_r1", "captions"} <= set(ours[-1])
    assert ours[-1]["caption_loss"] > 0


def test_the_reader_of_frozen_features_learns(tmp_path):
    """The encoder itself is compared where its weights are."""
    command = """
import torch, dual_encoder as d
torch.manual_seed(0)
features = torch.randn(8, 12)
pairs = d.Pairs(features, [[f"name {row} of it"] for row in range(8)], torch.arange(8))
*_, (model, pairs_seen, _) = d.train(pairs, 60, 8, 1, 60, lambda: d.feature_reader(12))
found = model.embed_pictures(features) @ model.embed_texts([d.features(f"name {row} of it") for row in range(8)]).t()
assert pairs_seen == 480 and found.argmax(1).tolist() == list(range(8)), found
"""
    assert popen(python("-c", command), cwd=BENCHMARKS, env=cpu_environment()).wait() == 0


def test_kills(tiny, tmp_path):
    command = python(BENCHMARKS / "kills.py", "--kills", "1", "--recipe", tiny.recipe, "--deepspeed", tiny.deepspeed())
    found = measured(command, tmp_path, "run.steps=8").figures
    assert found["kills"] == found["runs_that_ended_equal"] == 1 and found["complete_ones_not_used"] == 0


def test_rates(tiny, tmp_path):
    options = ("--rates", "1e-3,2e-3,1e-3", "--pairs", "110", "--steps", "2", "--runs", tmp_path / "runs")
    command = python(BENCHMARKS / "rates.py", *noise_pictures(tmp_path), *options, "--recipe", tiny.recipe)
    (row,) = measured(command, tmp_path, "run.samples_every=0").figures["rates"]
    assert row["rates"] == [1e-3, 2e-3, 1e-3] and row["scenes"]["eval_loss"] > 0 and row["pictures"]["caption_loss"] > 0
    plan = json.loads((tmp_path / "runs/0.001_0.002_0.001/plan.json").read_text())
    factors = {part: table["lr_scale"] for part, table in plan["recipe"]["train"].items()}
    assert factors | {"vision": 1.0, "embedding": 2.0, "heads": 1.0} == factors


def test_the_gpu_script_is_valid():
    subprocess.run(["bash", "-n", str(BENCHMARKS / "gpu.sh")], check=True)


def test_planning(tmp_path):
    options = ("--cluster", REPOSITORY / "launch/clusters/cpu.toml", "--configurations", "2 packs", "--steps", 1)
    found = measured(python(BENCHMARKS / "planning.py", *options), tmp_path).figures
    assert [*found["configurations"]] == ["2 packs"] and min(found["configurations"]["2 packs"].values()) > 0


def test_published(tmp_path):
    found = measured(python(BENCHMARKS / "published.py"), tmp_path).figures
    assert len(found) == 8 and all(of["predicted_tflops"] > 0 and of["source"] for of in found.values())
