"""Checkpoints on disk: which are complete, which is the newest, which are removed; and the lock of a run.

runs/NAME/checkpoints/
  latest                      the name of the newest complete checkpoint
  step_00000100/              DeepSpeed's files, model.safetensors, tokenizer.model, data.json, trainer.json, rng_*.pt
    manifest.json             written last: a folder without it is incomplete and not used
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import require_regular, write_atomically, write_json

CHECKPOINTS_NAME = "checkpoints"  # folder of a run
PLAN_NAME = "plan.json"  # of a run or an exported model
# Files of a checkpoint.
TOKENIZER_NAME = "tokenizer.model"
DATA_NAME = "data.json"
TRAINER_NAME = "trainer.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Topology:
    """The settings that DeepSpeed's files depend on."""

    world_size: int
    ep_size: int
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a complete checkpoint. `files`: size in bytes by relative path."""

    step: int
    topology: Topology
    tokenizer_sha256: str
    files: dict[str, int]


def checkpoint_name(step: int) -> str:
    """The folder name of an optimizer step."""
    return f"step_{step:08d}"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Mark `folder` as complete, with the sizes of its files in place of `manifest.files`."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    files.pop(MANIFEST_NAME, None)
    write_json(folder / MANIFEST_NAME, {**asdict(manifest), "files": files})


def complete(folder: Path, manifest: Manifest) -> None:
    """Mark a checkpoint as complete, and as the latest."""
    write_manifest(folder, manifest)
    write_atomically(folder.parent / "latest", folder.name + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None if it is missing, or if a file is missing or has another size."""
    try:
        raw = json.loads(require_regular(folder / MANIFEST_NAME).read_text())
        manifest = Manifest(raw["step"], Topology(**raw["topology"]), raw["tokenizer_sha256"], raw["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return manifest


def newest_complete(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint, if any. Does not read `latest`."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if manifest is not None:
            return folder, manifest
    return None


def lock_run(run_dir: Path) -> TextIO:
    """Lock a run while the returned file is open. Raises CheckpointError if another training has the lock.

    Does nothing on file systems without locks.
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
    with suppress(OSError):  # a full disk; the words are for people
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        file.flush()
    return file


def require_newest(run_dir: Path) -> tuple[Path, Manifest]:
    """The newest complete checkpoint of a run, or an exported model itself. Raises CheckpointError if there is none."""
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
    """Raise CheckpointError if a checkpoint cannot be resumed with this topology and tokenizer."""
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


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what interrupted savings have left: their space may be what the next one needs."""
    for folder in checkpoints.glob("step_*"):
        if not (folder / MANIFEST_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all checkpoints that are older than the `keep` newest complete ones."""
    folders = sorted(checkpoints.glob("step_*"), reverse=True)
    kept = 0
    for folder in folders:
        if kept >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif read_manifest(folder) is not None:
            kept += 1
