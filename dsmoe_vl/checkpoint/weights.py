"""The tensors of a model that is distributed in any topology, under their names in the one-process model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.moe.expert_parallel import ExpertParallelMoE
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, one_process_name
from dsmoe_vl.tasks.registry import build_backbone

EXPERT_WEIGHTS = ("w1", "w2", "w3")


def save_weights(model: nn.Module, zero_stage: int, folder: Path) -> None:
    """Gather all parameters, one at a time, and write them to `folder`: the same for every topology. Collective."""

    def whole(parameter: nn.Parameter) -> Tensor:
        if zero_stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    weights: dict[str, Tensor] = {}
    for name, value in one_process_tensors(model, whole):
        if dist.get_rank() == 0:
            weights[name.removeprefix("backbone.")] = value.to("cpu", copy=True).contiguous()
    for name, buffer in model.named_buffers():  # the routers' balancing biases, the same on every rank
        weights[one_process_name(name).removeprefix("backbone.")] = buffer.to("cpu", copy=True)
    if dist.get_rank() == 0:
        WeightsFile(folder).save(weights)


def require_same_model(folder: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if the tensors of a checkpoint are not those of the recipe's model.

    DeepSpeed would load some of them, so this check comes first.
    """
    with torch.device("meta"):
        model = build_backbone(recipe)
    expected = {name: list(value.shape) for name, value in model.state_dict().items() if name != "head.weight"}  # tied
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

    Experts of the ranks in an expert-parallel group are concatenated. All ranks get all tensors. Collective.
    """
    for name, part, group in _parts(model):
        value = torch.stack([read(one) for one in part]) if isinstance(part, list) else read(part)
        if group is not None:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, value.contiguous(), group=group)
            value = torch.cat(parts)
        yield name, value


def _parts(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Parameter | list[nn.Parameter], dist.ProcessGroup | None]]:
    """This rank's part of every tensor of the one-process model: its name, the parameter (or one per expert), and the
    group of ranks that have the other experts, if any."""
    groups: dict[str, dist.ProcessGroup] = {}
    separate: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallelMoE) and module.ep_size > 1:
            groups.update({f"{name}.experts.{weight}": module.ep_group for weight in EXPERT_WEIGHTS})
        elif isinstance(module, CapacityMoE):
            group = module.deepspeed_moe.ep_group if module.ep_size > 1 else None
            for weight in EXPERT_WEIGHTS:
                local = [getattr(expert, weight) for expert in module.local_experts]
                separate.update(map(id, local))
                yield f"{name}.experts.{weight}", local, group
    for name, parameter in model.named_parameters():
        if id(parameter) not in separate:
            yield one_process_name(name), parameter, groups.get(name)
