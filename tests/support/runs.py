"""A tiny dataset, recipe and model, and the commands that train and use them: real processes with time limits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.synthetic.generate import generate
from data_tools.tokenizer.train import train as train_tokenizer
from tests.distributed.ranks import REPOSITORY, Finished, cpu_environment, free_port, try_ranks
from tests.support.warm import popen

TRAIN = REPOSITORY / "launch" / "train.py"
STEPS = 24
CHECKPOINT_EVERY = 8

_RECIPE = """
[model]
width = 32
layers = 2
heads = 4
kv_heads = 2
ffn_width = 64

[model.vision]
patch_size = 8
merge = 2
width = 32
layers = 1
heads = 2
ffn_width = 48

[moe]
experts = 4
top_k = 2
ffn_width = 32
first_dense_layers = 1

[[data.sources]]
name = "images"
path = "{data}/images_train"
weight = 2.0

[[data.sources]]
name = "videos"
path = "{data}/videos_train"

[[data.evaluation]]
name = "images"
path = "{data}/images_eval"

[[data.evaluation]]
name = "videos"
path = "{data}/videos_eval"

[data]
pack_length = 256
pack_patches = 768
image_max_patches = 36
frame_max_patches = 16
video_frames = 4
frame_pool = 1
lanes = 4
lookahead = 16
shuffle_block = 4
workers = 0

[tokenizer]
path = "{data}/tokenizer.model"
vocab_size = 320

[run]
steps = {steps}
log_every = 1
evaluate_every = 12
evaluate_packs = 8
checkpoint_every = {checkpoint_every}
keep_checkpoints = 3
samples_every = 0
"""
SHOWS_SAMPLES = "run.samples_every=500"  # at the end of any run: as long as the training, so only where it is asked for


@dataclass(frozen=True)
class TinyProject:
    """A folder with shards, tokenizer, recipe and a DeepSpeed JSON for every ZeRO stage."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.toml"

    def deepspeed(self, stage: int = 2) -> Path:
        return self.folder / f"zero{stage}.json"

    def arguments(self, run: Path, *more: str, stage: int = 2) -> list[str]:
        """The command line of launch/train.py."""
        return ["--deepspeed", str(self.deepspeed(stage)), "--recipe", str(self.recipe), "--run-dir", str(run), *more]

    @classmethod
    def create(cls, folder: Path) -> TinyProject:
        project = write_project(folder)
        generate(project.data, images=40, videos=8, eval_images=8, eval_videos=4, size=48)
        train_tokenizer(
            [project.data / "images_train", project.data / "videos_train"],
            project.data / "tokenizer.model",
            vocab_size=320,
        )
        return project


def write_project(folder: Path) -> TinyProject:
    """The recipe and the DeepSpeed JSONs alone; shards and tokenizer are expected in `folder`/data."""
    project = TinyProject(folder)
    project.recipe.write_text(_RECIPE.format(data=project.data, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY))
    for stage in (2, 3):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95]}},
            "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 4}},
            "zero_optimization": {"stage": stage},
            "expert_parallel": {"enabled": True, "autoep_size": 2},
            "tensorboard": {"enabled": True},
        }
        project.deepspeed(stage).write_text(json.dumps(config))
    return project


def start(command: Sequence[object], cold: bool = False, **environment: str) -> subprocess.Popen[str]:
    """A command in a session of its own, whose group can be signalled like a terminal's. `cold`: of tests.support.warm,
    for what the start of Python is a part of."""
    return popen(
        command,
        cold,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=cpu_environment(**environment),
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_seconds: float = 120) -> Finished:
    """Wait until the command and everything that it started have ended. Fails, and kills them, after the time limit."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"{process.args} did not end in {timeout_seconds} s\n{out[-3000:]}\n{err[-6000:]}"
        ) from None
    return Finished(process.returncode, out, err)


def two_ranks(arguments: list[str], timeout_seconds: int = 150, script: Path = TRAIN, **environment: str) -> Finished:
    """Two ranks without a launcher: the first status that is not 0, and what they wrote, one after the other."""
    ranks = try_ranks(script, arguments, 2, timeout_seconds, **environment)
    status = next((rank.status for rank in ranks if rank.status), 0)
    return Finished(status, "".join(rank.out for rank in ranks), "".join(rank.err for rank in ranks))


def deepspeed_command(arguments: list[str]) -> list[str]:
    """Two ranks through DeepSpeed's own launcher."""
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    return [*launcher, str(TRAIN), *arguments]


def impatient(folder: Path) -> dict[str, str]:
    """An environment in which DeepSpeed's launcher kills after 3 s, and not 30, what a signal has not ended: a process
    that is stopped, or one that waits for the first rank. For runs that have nothing to save by then."""
    (folder / "sitecustomize.py").write_text(
        "import psutil\n"
        "_wait = psutil.wait_procs\n"
        "psutil.wait_procs = lambda processes, timeout=None: _wait(processes, 3 if timeout == 30 else timeout)\n"
    )
    return {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[float, ...]]:
    """Step, losses, gradient norm and learning rate of every step; step and loss of every evaluation."""
    names = ("step", "loss", "loss_caption", "grad_norm", "lr", "eval_loss_caption")
    return [tuple(line[name] for name in names if name in line) for line in metrics(run)]


def python(*arguments: object) -> list[str]:
    """A command of one Python process."""
    return [sys.executable, *map(str, arguments)]
