"""Checkpoints on disk: which are complete, which is the newest, which are removed; and the lock of a run.

runs/NAME/checkpoints/
  latest                      the name of the newest complete checkpoint
  step_00000100/              the files that docs/design/checkpoints.md lists
    manifest.json             written last: a folder without it is incomplete and not used
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dsmoe_vl.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from dsmoe_vl.data.vocabulary import FILE_NAMES
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import sync_folder, write_atomically

CHECKPOINTS_NAME = "checkpoints"  # folder of a run
PLAN_NAME = "plan.json"  # of a run or an exported model
# Files of a checkpoint.
DATA_NAME = "data.json"
TRAINER_NAME = "trainer.json"
LATEST_NAME = "latest"  # beside them


def checkpoint_name(step: int) -> str:
    """The folder name of an optimizer step."""
    return f"step_{step:08d}"


def complete(folder: Path, manifest: Manifest) -> None:
    """Mark a checkpoint as complete, and as the latest. Its files must be on disk already."""
    sync_folder(folder)
    write_manifest(folder, manifest)
    sync_folder(folder.parent)
    write_atomically(folder.parent / LATEST_NAME, folder.name + "\n")


def complete_ones(checkpoints: Path) -> Iterator[tuple[Path, Manifest]]:
    """The complete checkpoints, from the newest. Does not read `latest`."""
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if manifest is not None:
            yield folder, manifest


def newest_complete(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint, if any."""
    return next(complete_ones(checkpoints), None)


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


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer of a checkpoint or an exported model, under the name of its kind."""
    places = [folder / name for name in FILE_NAMES]
    return next((place for place in places if place.exists()), places[0])


def require_tokenizer(folder: Path, manifest: Manifest, tokenizer_sha256: str) -> None:
    """Raise CheckpointError if a checkpoint was trained with another tokenizer."""
    if manifest.tokenizer_sha256 != tokenizer_sha256:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer (pieces {manifest.tokenizer_sha256[:12]}, now "
            f"{tokenizer_sha256[:12]}): set tokenizer.path to {tokenizer_in(folder)}, or start a new run.name"
        )


def remove_unfinished(checkpoints: Path) -> list[str]:
    """Remove what interrupted savings have left: their space may be what the next one needs. Returns their names.

    A folder that `latest` names was complete once, so it stays.
    """
    latest = latest_name(checkpoints)
    unfinished = [
        folder for folder in sorted(checkpoints.glob("step_*"))
        if not (folder / MANIFEST_NAME).exists() and folder.name != latest
    ]  # fmt: skip
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in unfinished]


def latest_name(checkpoints: Path) -> str | None:
    """The name of the newest checkpoint that was ever complete; None if there was none."""
    try:
        return (checkpoints / LATEST_NAME).read_text().strip()
    except (OSError, ValueError):
        return None


def prune(checkpoints: Path, keep: int, keep_every: int = 0) -> None:
    """Remove checkpoints that are older than the `keep` newest complete ones, but for those of every `keep_every`-th
    step (0: none)."""
    kept = 0
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if kept < keep:
            kept += manifest is not None
        elif not (keep_every and manifest is not None and manifest.step % keep_every == 0):
            shutil.rmtree(folder, ignore_errors=True)
