"""Which checkpoint a run continues from: one that all ranks see, and whose content is what was written."""

from __future__ import annotations

import socket
from pathlib import Path

from dsmoe_vl.checkpoint.manifest import Manifest, damaged, manifest_id, read_manifest
from dsmoe_vl.checkpoint.store import complete_ones, latest_name
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks


def newest_sound(checkpoints: Path, ranks: Ranks, host: HostGroup) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """The newest checkpoint whose files all have the content that the manifest says, and notes on those passed over.

    The ranks read a share of the files each. Raises CheckpointError if ranks see different checkpoints, or if there was
    one and none is sound. Collective.
    """
    _require_same(checkpoints, host)
    notes: list[str] = []
    for folder in sorted(checkpoints.glob("step_*"), reverse=True):
        manifest = read_manifest(folder)
        if manifest is None:
            notes.append(f"{folder} is passed over: files are missing, cut short, or cannot be read")
            continue
        own = sorted(manifest.files)[ranks.rank :: ranks.world_size]
        found = host.gather(damaged(folder, {name: manifest.files[name] for name in own}))
        reasons = [reason for of_rank in found for reason in of_rank]
        if not reasons:
            return (folder, manifest), notes
        notes.append(f"{folder} is passed over: {'; '.join(reasons)}")
    if latest_name(checkpoints) is not None:
        end = (
            f"{checkpoints} had a complete checkpoint, {latest_name(checkpoints)}, and has none that can be resumed: "
            "restore one, or start anew with --fresh, which keeps this run under another name"
        )
        raise CheckpointError("\n".join([*notes, end]))
    return None, notes


def _require_same(checkpoints: Path, host: HostGroup) -> None:
    own = {folder.name: manifest_id(folder) for folder, _ in complete_ones(checkpoints)}
    of_ranks = host.gather((socket.gethostname(), own))
    first_host, first = of_ranks[0]
    for rank, (name, found) in enumerate(of_ranks):
        if found != first:
            other = sorted(step for step in first.keys() | found.keys() if first.get(step) != found.get(step))
            raise CheckpointError(
                f"{checkpoints} is not the same for all ranks: rank {rank} on {name} and rank 0 on {first_host} differ "
                f"in {', '.join(other)}: set run.directory to a folder that all hosts share"
            )
