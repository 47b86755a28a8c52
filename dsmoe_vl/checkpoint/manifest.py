"""What a checkpoint must have: the names, sizes and hashes of its files, from those who wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsmoe_vl.checkpoint.tensor_files import FileEntry, file_entry
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import require_regular, write_json

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Topology:
    """How the ranks that wrote a checkpoint had divided the model."""

    world_size: int
    ep_size: int
    zero_stage: int
    precision: str

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{ranks}, EP {self.ep_size}, ZeRO-{self.zero_stage}, {self.precision}"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a complete checkpoint. `files`: by name in its folder."""

    step: int
    topology: Topology
    tokenizer_sha256: str
    files: dict[str, FileEntry]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Mark `folder` as complete. Its files must be on disk already."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None if it is missing, or if a file is missing or has another size."""
    try:
        raw = json.loads(require_regular(folder / MANIFEST_NAME).read_text())
        files = {str(name): FileEntry(*entry) for name, entry in raw["files"].items()}
        manifest = Manifest(int(raw["step"]), Topology(**raw["topology"]), raw["tokenizer_sha256"], files)
        complete = all(
            Path(name).name == name and (folder / name).is_file() and (folder / name).stat().st_size == entry.size
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def manifest_id(folder: Path) -> str:
    """Which checkpoint it is: the hash of its manifest, and so of everything in it. Raises OSError."""
    return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()


def entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Of files that are there. Raises OSError."""
    return {name: file_entry(folder / name) for name in names}


def require_content(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raise CheckpointError if a file does not have the content that the manifest says."""
    wanted = {name: manifest.files[name] for name in names if name in manifest.files}
    if reasons := damaged(folder, wanted):
        raise CheckpointError(f"{folder}: {'; '.join(reasons)}: restore it, or remove the folder to use an older one")


def damaged(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Why files cannot be trusted, one line for each: other content, or they cannot be read."""
    found = []
    for name, entry in files.items():
        try:
            if file_entry(folder / name) != entry:
                found.append(f"{name} has changed since it was written")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found
