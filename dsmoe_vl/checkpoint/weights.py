"""The weights of a model in one file that needs neither DeepSpeed nor the topology that trained it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dsmoe_vl.moe.capacity import CapacityMoE, one_process_name
from dsmoe_vl.moe.layer import ExpertParallelMoE

EXPERT_WEIGHTS = ("w1", "w2", "w3")


def save_weights(model: nn.Module, zero_stage: int, path: Path) -> None:
    """Gather every parameter to rank 0, one at a time, and write it under its name in the one-process model.

    Collective: every rank calls it. Expert tensors of the ranks of one expert-parallel group are joined.
    """
    weights: dict[str, Tensor] = {}
    for name, held, group in _held(model):
        gathered = deepspeed.zero.GatheredParameters([held]) if zero_stage == 3 else nullcontext()
        with gathered, torch.no_grad():
            value = torch.stack(held) if isinstance(held, list) else held.detach()
            if group is not None:
                parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, value.contiguous(), group=group)
                value = torch.cat(parts)
            if dist.get_rank() == 0:
                weights[name.removeprefix("backbone.")] = value.to("cpu", copy=True).contiguous()
    for name, buffer in model.named_buffers():  # the routers' balancing biases, the same on every rank
        weights[one_process_name(name).removeprefix("backbone.")] = buffer.to("cpu", copy=True)
    if dist.get_rank() == 0:
        save_file(weights, path)


def _held(model: nn.Module) -> Iterator[tuple[str, Tensor | list[Tensor], dist.ProcessGroup | None]]:
    """What this rank holds of every tensor of the one-process model: its name, the tensor (or one tensor an expert),
    and the ranks that hold the other experts, in order, where there are any."""
    groups: dict[str, dist.ProcessGroup] = {}
    separate: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallelMoE) and module.ep_size > 1:
            groups.update({f"{name}.experts.{weight}": module.ep_group for weight in EXPERT_WEIGHTS})
        elif isinstance(module, CapacityMoE):
            group = module.deepspeed_moe.ep_group if module.ep_size > 1 else None
            for weight in EXPERT_WEIGHTS:
                held = [getattr(expert, weight) for expert in module.local_experts]
                separate.update(map(id, held))
                yield f"{name}.experts.{weight}", held, group
    for name, parameter in model.named_parameters():
        if id(parameter) not in separate:
            yield one_process_name(name), parameter, groups.get(name)
