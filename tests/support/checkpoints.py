"""Checkpoints that tests write themselves."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from dsmoe_vl.checkpoint.manifest import Manifest, Topology, entries
from dsmoe_vl.checkpoint.partitions import host_groups
from dsmoe_vl.checkpoint.store import complete
from dsmoe_vl.checkpoint.tensor_files import write_tensors
from dsmoe_vl.checkpoint.weights import own_weights
from dsmoe_vl.checkpoint.weights_file import WeightsFile, shard_name
from dsmoe_vl.parallel.process_group import HostGroup


def complete_with(folder: Path, weights: dict[str, Tensor], tokenizer_sha256: str, step: int = 7) -> None:
    """Add weights to a folder, and mark it as the complete checkpoint of one rank."""
    head, embedding = weights.get("head.weight"), weights["embedding.weight"]
    is_tied = head is not None and head.data_ptr() == embedding.data_ptr()
    kept = {name: value.contiguous() for name, value in weights.items() if not (is_tied and name == "head.weight")}
    WeightsFile(folder).save(kept)
    files = entries(folder, sorted(path.name for path in folder.iterdir()))
    complete(folder, Manifest(step, Topology(1, 1, 2, "fp32"), tokenizer_sha256, files))


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights of a distributed model, and wait for all ranks. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = own_weights(model, host_groups(model, HostGroup()))
    entry = write_tensors(folder / shard_name(rank, ranks), own).entry
    written: list[tuple[list[str], object]] = [([], None)] * ranks
    dist.all_gather_object(written, (list(own.specs), entry))
    if rank == 0:
        places = {name: shard_name(at, ranks) for at, (names, _) in enumerate(written) for name in names}
        files = {shard_name(at, ranks): found for at, (_, found) in enumerate(written)}
        WeightsFile(folder).write_index(places, files)
    dist.barrier()
