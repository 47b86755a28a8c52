"""The tensors of a model that is distributed in any topology, under their names in the one-process model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsmoe_vl.checkpoint.partitions import HostGroups, Joint, is_partitioned, own_part
from dsmoe_vl.checkpoint.tensor_files import Share, Spec
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.model.without_values import without_values
from dsmoe_vl.moe.expert_names import expert_name
from dsmoe_vl.moe.expert_parallel_capacity import one_process_name
from dsmoe_vl.moe.placement import Placed, placed
from dsmoe_vl.tasks.registry import build_backbone


def own_weights(model: nn.Module, groups: HostGroups) -> Share:
    """This rank's share of all weights and buffers, as `WeightsFile` stores them.

    Each is in the share of one rank that has it. At ZeRO-3 the ranks that keep parts of a tensor put it together in
    their `groups`, when it is made.
    """
    wanted = list(_assigned(model))
    buffers: dict[str, Tensor] = {}
    if dist.get_rank() == 0:  # the routers' balancing biases, the same on every rank
        buffers = {_stored_name(name): buffer for name, buffer in model.named_buffers()}
    specs = {
        name: Spec(where.parameter.dtype, where.shape[-2:] if where.experts is not None else where.shape)
        for where, _, rows in wanted
        for name in rows
    }
    specs |= Share.of(buffers).specs
    if not any(is_partitioned(where) for where, _, _ in wanted):
        values = (row for where, _, rows in wanted for row in _of(where.parameter.detach(), rows))
        return Share(specs, chain(values, buffers.values()))
    joints = [(Joint.of(where, owner), rows) for where, owner, rows in wanted]

    def assemble(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        left = iter(parts)
        for (joint, rows), part in zip(joints, left, strict=False):  # the shorter first, or a buffer would be taken
            whole = joint.whole(part, groups)
            if whole is not None:
                yield from _of(whole, rows)
            del whole
        yield from left

    return Share(specs, chain((own_part(where) for where, _, _ in wanted), buffers.values()), assemble)


def _assigned(model: nn.Module) -> Iterator[tuple[Placed, int | None, dict[str, int | None]]]:
    """All parameters, the rank that writes each, and what of it is in this rank's share: the row of an expert, None for
    the whole, by name. Experts have no one writer: ranks with the same ones write some each."""
    loads = [0] * dist.get_world_size()
    for where in placed(model):
        if where.experts is None:
            owner = loads.index(min(loads))
            loads[owner] += where.numel
            yield where, owner, {where.name: None} if owner == dist.get_rank() else {}
        else:
            mine = range(where.copy_number, len(where.experts), where.copy_count)
            yield where, None, {expert_name(where.name, where.experts[row]): row for row in mine}


def _of(whole: Tensor, rows: Mapping[str, int | None]) -> Iterator[Tensor]:
    """What of a parameter is in the share."""
    for row in rows.values():
        yield whole if row is None or whole.dim() == 2 else whole[row]


def _stored_name(name: str) -> str:
    return one_process_name(name).removeprefix("backbone.")


def load_buffers(model: nn.Module, folder: Path) -> None:
    """Fill the buffers of the module that the engine wraps."""
    weights = WeightsFile(folder)
    for name, buffer in model.named_buffers():
        buffer.copy_(weights.flat(_stored_name(name), 0, buffer.numel()).view_as(buffer))


def require_same_model(folder: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if the tensors of a checkpoint are not those of the recipe's model."""
    with without_values():
        model = build_backbone(recipe)
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    if recipe.model.tied:
        del expected["head.weight"]
    saved = WeightsFile(folder).shapes()
    names = sorted(name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name))
    if names:
        one = names[0]
        raise CheckpointError(
            f"{folder} is of another model: {len(names)} tensors differ, {one} is {saved.get(one, 'missing')} there "
            f"and {expected.get(one, 'missing')} in this recipe; restore the recipe's settings, or start a new run.name"
        )


def one_process_tensors(model: nn.Module, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The results of `read` (value or gradient) for all parameters, under their names in the one-process model.

    The experts of all ranks are put together. All ranks get all tensors: for checks of small models. Collective.
    """
    separate: dict[str, list[Tensor]] = {}
    for where in placed(model):
        value = read(where.parameter)
        if where.experts is None:
            yield f"backbone.{where.name}", value
            continue
        if value.dim() == 2:
            value = value.unsqueeze(0)
        separate.setdefault(where.name, []).append(value)
    for name, parts in separate.items():
        own = torch.cat(parts)
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, own.contiguous())
        first = next(where for where in placed(model) if where.name == name)
        groups = dist.get_world_size() // first.copy_count  # ranks with other experts
        yield f"backbone.{name}", torch.cat(of_ranks[:groups])
