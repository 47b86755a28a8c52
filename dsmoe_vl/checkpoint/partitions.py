"""Weights that ZeRO-3 has partitioned, put together on the host beside training: from copies, in groups of their own.

The engine's own gather would be a collective of the thread that trains, which would stand still for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsmoe_vl.moe.placement import Placed, placed
from dsmoe_vl.parallel.process_group import HostGroup

# By the ranks that have parts of the same parameters.
HostGroups = Mapping[tuple[int, ...], dist.ProcessGroup]


def host_groups(model: nn.Module, host: HostGroup) -> HostGroups:
    """A gloo group for each set of ranks between which parameters are partitioned; none below ZeRO-3. Collective."""
    own = sorted({_ranks(where) for where in placed(model) if is_partitioned(where)})
    known = sorted({ranks for of_rank in host.gather(own) for ranks in of_rank if len(ranks) > 1})
    return {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in known}  # every rank makes all of them


def first_failure(failure: OSError | None, groups: HostGroups) -> OSError | None:
    """What failed on the first rank on which anything did, before they put parameters together: nobody may then begin.

    Collective of all ranks at ZeRO-3; below, each rank has its own alone.
    """
    world = groups.get(tuple(range(dist.get_world_size())))
    if world is None:
        return failure
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=world)
    return next((of_rank for of_rank in failures if of_rank is not None), None)


def is_partitioned(where: Placed) -> bool:
    """Whether ZeRO-3 has partitioned it."""
    return hasattr(where.parameter, "ds_id")


def own_part(where: Placed) -> Tensor:
    """This rank's part of a partitioned parameter, flat; that of the last rank is filled up."""
    part: Tensor = where.parameter.ds_tensor.data
    return part


class Joint(NamedTuple):
    """A parameter of several ranks. `owner`: the rank that gets the whole; None: all that have parts."""

    ranks: tuple[int, ...]
    shape: tuple[int, ...]
    owner: int | None

    @classmethod
    def of(cls, where: Placed, owner: int | None) -> Joint:
        """A partitioned one."""
        return cls(_ranks(where), where.shape, owner)

    def whole(self, part: Tensor, groups: HostGroups) -> Tensor | None:
        """The parameter, where it is wanted, of this rank's part of it. Collective of its ranks."""
        part = part.to("cpu")
        parts: list[Tensor] | None = [part]
        if len(self.ranks) > 1:
            raw, group = part.contiguous().view(torch.uint8), groups[self.ranks]
            parts = [torch.empty_like(raw) for _ in self.ranks] if self.owner in (None, dist.get_rank()) else None
            if self.owner is None:
                dist.all_gather(parts, raw, group=group)
            else:
                dist.gather(raw, parts, dst=self.owner, group=group)
        if parts is None:
            return None
        count = torch.Size(self.shape).numel()
        return torch.cat(parts).view(part.dtype)[:count].view(self.shape)


def _ranks(where: Placed) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(where.parameter.ds_process_group))
