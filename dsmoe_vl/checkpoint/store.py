"""Checkpoints on disk: which are complete, which is the newest, which may go; and who may write them.

runs/NAME/checkpoints/
  latest                      the name of the newest complete checkpoint
  step_00000100/              DeepSpeed's files, model.safetensors, tokenizer.model, data.json, trainer.json, rng_*.pt
    manifest.json             written last and atomically: a folder without it does not count
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import write_atomically, write_json

CHECKPOINTS_NAME = "checkpoints"  # folder of a run
PLAN_NAME = "plan.json"  # of a run or an exported model
# Files of a checkpoint.
TOKENIZER_NAME = "tokenizer.model"
DATA_NAME = "data.json"
TRAINER_NAME = "trainer.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Topology:
    """What DeepSpeed's own files depend on."""

    world_size: int
    ep_size: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself. `files` maps a relative path to its size in bytes."""

    step: int
    topology: Topology
    tokenizer_sha256: str
    files: dict[str, int]


def checkpoint_name(step: int) -> str:
    """The folder of an optimizer step."""
    return f"step_{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Declare the files of `folder` complete. `manifest.files` is filled here."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST_NAME, None)
    write_json(folder / MANIFEST_NAME, {**asdict(manifest), "files": files})


def complete(folder: Path, manifest: Manifest) -> None:
    """Declare a checkpoint complete: manifest last, then `latest`."""
    write_manifest(folder, manifest)
    write_atomically(folder.parent / "latest", folder.name + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None where it is missing, or a file is missing or cut short."""
    try:
        raw = json.loads((folder / MANIFEST_NAME).read_text())
        manifest = Manifest(raw["step"], Topology(**raw["topology"]), raw["tokenizer_sha256"], raw["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return manifest


def newest_complete(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint, whatever `latest` says; None where there is none."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if manifest is not None:
            return folder, manifest
    return None


def hold(run_dir: Path) -> TextIO:
    """Keep other trainings out of a run while the returned file is open. Raises CheckpointError where one goes on.

    On file systems without locks none is noticed.
    """
    file = (run_dir / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise CheckpointError(
            f"{run_dir} is being trained by {file.read().strip()}: wait until it has ended, or set another run.name"
        ) from None
    except OSError:
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    file.flush()
    return file


def require_newest(run_dir: Path) -> tuple[Path, Manifest]:
    """As `newest_complete` for a run; an exported model is its own checkpoint. Raises CheckpointError where none is."""
    exported = read_manifest(run_dir)
    if exported is not None:
        return run_dir, exported
    checkpoints = run_dir / CHECKPOINTS_NAME
    found = newest_complete(checkpoints)
    if found is None:
        raise CheckpointError(
            f"no complete checkpoint under {checkpoints}: train first, or name another run with --run"
        )
    return found


def require_fit(folder: Path, manifest: Manifest, topology: Topology, tokenizer_sha256: str) -> None:
    """Raise CheckpointError unless a checkpoint can be resumed with this topology and tokenizer."""
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer (pieces {manifest.tokenizer_sha256[:12]}, now "
            f"{tokenizer_sha256[:12]}): set tokenizer.path to {folder / TOKENIZER_NAME}, or start a new run.name"
        )
    for name, saved in asdict(manifest.topology).items():
        now = getattr(topology, name)
        if saved != now:
            raise CheckpointError(
                f"{folder} was written with {name}={saved}, this run has {name}={now}: "
                f"resume with {name}={saved}, or start a new run.name"
            )


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the `keep` newest complete checkpoints, and the incomplete ones that are older than these."""
    folders = sorted(checkpoints.glob("step_*"), reverse=True)
    kept = 0
    for folder in folders:
        if kept >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif read_manifest(folder) is not None:
            kept += 1
