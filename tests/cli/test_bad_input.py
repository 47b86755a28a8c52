"""What a user can get wrong: every rank ends with status 2, and one message names the value, the place and the fix."""

from __future__ import annotations

import json
import os
import shutil
import tarfile

import pytest

from data_tools.tokenizer.train import train as train_tokenizer
from dsmoe_vl.checkpoint.store import lock_run
from tests.distributed.ranks import run_ranks, try_ranks
from tests.support.runs import STEPS, TRAIN, metrics


def refusal(arguments, world_size=2):
    """The one line that all ranks together have to say."""
    ranks = try_ranks(TRAIN, arguments, world_size, timeout_seconds=100)
    report = "\n".join(f"--- rank {i}: {rank.status}\n{rank.out}\n{rank.err}" for i, rank in enumerate(ranks))
    errors = [line for rank in ranks for line in rank.err.splitlines() if line.startswith("error")]
    assert [rank.status for rank in ranks] == [2] * world_size, report
    assert len(errors) == 1 and "Traceback" not in report, report
    return errors[0]


def refused(arguments, *expected, world_size=2):
    message = refusal(arguments, world_size)
    for text in expected:
        assert str(text) in message, message


class TestSettings:
    """Found before a process group exists."""

    @pytest.fixture
    def run(self, tmp_path):
        yield tmp_path / "run"
        assert not (tmp_path / "run").exists()

    def test_missing_recipe(self, tiny, run):
        arguments = tiny.arguments(run)
        arguments[arguments.index(str(tiny.recipe))] = "launch/recipes/quikstart.toml"
        refused(arguments, "launch/recipes/quikstart.toml does not exist", "launch/recipes/quickstart.toml")

    def test_typo_in_the_recipe(self, tiny, run, tmp_path):
        recipe = tmp_path / "typo.toml"
        recipe.write_text(tiny.recipe.read_text().replace("top_k =", "topk ="))
        refused([*tiny.arguments(run), "--recipe", str(recipe)], "moe.topk", recipe, 'Did you mean "moe.top_k"?')

    def test_typo_in_an_override(self, tiny, run):
        refused(tiny.arguments(run, "run.stepz=3"), "run.stepz", "'run.stepz=3'", 'Did you mean "run.steps"?')

    def test_typo_in_the_deepspeed_json(self, tiny, run, tmp_path):
        config = json.loads(tiny.deepspeed().read_text())
        config["gradient_cliping"] = config.pop("gradient_clipping")
        (tmp_path / "typo.json").write_text(json.dumps(config))
        arguments = [*tiny.arguments(run), "--deepspeed", str(tmp_path / "typo.json")]
        refused(arguments, "gradient_cliping", tmp_path / "typo.json", 'Did you mean "gradient_clipping"?')

    def test_expert_parallelism_that_does_not_divide(self, tiny, run, tmp_path):
        config = json.loads(tiny.deepspeed().read_text())
        config["expert_parallel"]["autoep_size"] = 4
        (tmp_path / "ep4.json").write_text(json.dumps(config))
        arguments = [*tiny.arguments(run), "--strict", "--deepspeed", str(tmp_path / "ep4.json")]
        refused(arguments, "autoep_size = 4", tmp_path / "ep4.json", "world size 2", "Set it to 2")

    def test_more_experts_a_token_than_there_are(self, tiny, run):
        refused(tiny.arguments(run, "moe.top_k=9"), "moe.top_k", "9", "at most moe.experts = 4", tiny.recipe)


class TestData:
    """Found by all ranks, or by the one that meets it."""

    def test_missing_shards(self, tiny, tmp_path):
        arguments = tiny.arguments(tmp_path / "run", 'data.sources=[{name="photos", path="no/such/folder"}]')
        refused(arguments, "photos", "no/such/folder", "data.sources")

    def test_shard_that_was_cut_after_its_manifest(self, tiny, tmp_path):
        folder = shutil.copytree(tiny.data / "images_train", tmp_path / "cut")
        (tar,) = folder.glob("*.tar")
        tar.write_bytes(tar.read_bytes()[:20_000])
        arguments = tiny.arguments(tmp_path / "run", f'data.sources=[{{name="photos", path="{folder}"}}]')
        refused(arguments, "photos", tar, "20000 bytes", "copy it again", world_size=1)

    def test_nothing_but_broken_images(self, tiny, tmp_path):
        folder = with_broken_images(tiny, tmp_path / "broken", every=1)
        arguments = tiny.arguments(tmp_path / "run", f'data.sources=[{{name="photos", path="{folder}"}}]')
        refused(arguments, "photos", "data.max_bad_fraction = 0.01", "image cannot be decoded")

    def test_some_bad_samples_are_skipped_and_counted(self, tiny, tmp_path):
        """Broken images in the middle of a shard, and a shard without a manifest that was cut."""
        run = tmp_path / "run"
        images = with_broken_images(tiny, tmp_path / "images", every=8)
        videos = shutil.copytree(tiny.data / "videos_train", tmp_path / "videos")
        (videos / "index.json").unlink()
        (tar,) = videos.glob("*.tar")
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 2 // 3])
        sources = f'data.sources=[{{name="images", path="{images}"}}, {{name="videos", path="{videos}"}}]'
        run_ranks(TRAIN, tiny.arguments(run, sources, "data.max_bad_fraction=0.5"), world_size=2)
        last = [line for line in metrics(run) if "loss" in line][-1]
        assert last["step"] == STEPS
        assert last["images/errors"] == last["images/errors/image cannot be decoded"] > 0
        assert last["videos/errors"] == last["videos/errors/damaged shard"] > 0
        listed = [json.loads(line) for file in run.glob("quarantine_*.jsonl") for line in file.open()]
        assert len(listed) == last["images/errors"] + last["videos/errors"]
        assert {bad["sample"] for bad in listed if bad["source"] == "images"} <= set(range(0, 40, 8))


class TestTokenizer:
    def test_missing(self, tiny, tmp_path):
        arguments = tiny.arguments(tmp_path / "run", "tokenizer.path=no/tokenizer.model")
        refused(arguments, "no/tokenizer.model: no such file", "data_tools.tokenizer train", world_size=1)

    def test_larger_than_the_embedding(self, tiny, tmp_path):
        arguments = tiny.arguments(tmp_path / "run", "tokenizer.vocab_size=300")
        refused(arguments, "tokenizer.vocab_size = 300", tiny.data / "tokenizer.model", "320", world_size=1)


LONGER = f"run.steps={STEPS + 8}"  # of a finished run nothing is loaded


class TestResume:
    """A checkpoint that does not fit what is asked for now; it is left as it was."""

    @pytest.fixture
    def run(self, trained):
        before = sorted((path, path.stat().st_mtime_ns) for path in (trained / "checkpoints").rglob("*"))
        yield trained
        assert sorted((path, path.stat().st_mtime_ns) for path in (trained / "checkpoints").rglob("*")) == before

    def test_another_tokenizer(self, tiny, run, tmp_path):
        train_tokenizer([tiny.data / "images_train"], tmp_path / "other.model", vocab_size=300)
        arguments = tiny.arguments(run, LONGER, f"tokenizer.path={tmp_path / 'other.model'}")
        kept = run / "checkpoints" / f"step_{STEPS:08d}" / "tokenizer.model"
        refused(arguments, "another tokenizer", f"set tokenizer.path to {kept}")

    @pytest.mark.parametrize(
        ("setting", "difference"),
        [
            ("model.width=64", "connector"),
            ("moe.experts=8", "experts.w1 is [4, 32, 32] there and [8, 32, 32] in"),
            ("model.layers=3", "layers.2.attention.k_norm.weight is missing there"),
        ],
    )
    def test_another_model(self, tiny, run, setting, difference):
        refused(tiny.arguments(run, setting), f"step_{STEPS:08d} is of another model", difference, "new run.name")

    def test_another_training(self, tiny, run):
        with lock_run(run):
            refused(tiny.arguments(run), f"{run} is being trained by process {os.getpid()} of ", world_size=1)

    @pytest.mark.long
    def test_another_training_of_two_ranks(self, tiny, run):
        with lock_run(run):
            first, other = try_ranks(TRAIN, tiny.arguments(run), 2, timeout_seconds=100)
        assert first.status == 2 and other.status, first.err + other.err
        assert f"error (rank 0): {run} is being trained by process {os.getpid()} of " in first.err
        assert other.err == ""  # it ends because the first rank has

    def test_another_order_of_the_data(self, tiny, run):
        refused(tiny.arguments(run, LONGER, "run.seed=2"), "run.seed was 1", "is 2 now", "start a new run")


def with_broken_images(tiny, folder, every):
    """A copy of the training images in which every n-th begins with zeros; sizes and manifest stay as they are."""
    shutil.copytree(tiny.data / "images_train", folder)
    (tar,) = folder.glob("*.tar")
    with tarfile.open(tar) as archive:
        images = [member for member in archive if member.name.endswith(".jpg")]
    with tar.open("r+b") as file:
        for member in images[::every]:
            file.seek(member.offset_data)
            file.write(bytes(64))
    return folder
