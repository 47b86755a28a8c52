"""The weights of a model in one file that needs neither DeepSpeed nor the topology that trained it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dsmoe_vl.moe.layer import ExpertParallelMoE


def save_weights(model: nn.Module, zero_stage: int, path: Path) -> None:
    """Gather every parameter to rank 0, one at a time, and write it under its name in the one-process model.

    Collective: every rank calls it. Expert tensors of the ranks of one expert-parallel group are joined.
    """
    groups = {
        f"{name}.experts.{weight}": module.ep_group
        for name, module in model.named_modules()
        if isinstance(module, ExpertParallelMoE) and module.ep_size > 1
        for weight in ("w1", "w2", "w3")
    }
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter]) if zero_stage == 3 else nullcontext()
        with gathered, torch.no_grad():
            value = parameter.detach()
            if name in groups:
                parts = [torch.empty_like(value) for _ in range(dist.get_world_size(groups[name]))]
                dist.all_gather(parts, value.contiguous(), group=groups[name])
                value = torch.cat(parts)
            if dist.get_rank() == 0:
                weights[name.removeprefix("backbone.")] = value.to("cpu", copy=True).contiguous()
    if dist.get_rank() == 0:
        save_file(weights, path)
