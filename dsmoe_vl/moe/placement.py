"""Where the parameters of one rank lie in the one-process model, whatever the expert parallelism and the ZeRO stage.

First values and everything in a checkpoint are addressed in the one-process model: by the name of a tensor, and a range
of it, flattened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from dsmoe_vl.moe.expert_names import is_of_experts
from dsmoe_vl.moe.expert_parallel import ExpertParallelMoE
from dsmoe_vl.moe.expert_parallel_capacity import CapacityMoE, one_process_name

_MODULE = "backbone."  # of the module that the engine wraps


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank. `name`: its tensor in the one-process model.

    `experts`: the numbers of the experts in it, of all E in that tensor; None for other parameters.
    """

    name: str
    parameter: Any
    experts: range | None = None

    @property
    def numel(self) -> int:
        """Elements, also of a parameter that ZeRO-3 has partitioned."""
        return getattr(self.parameter, "ds_numel", self.parameter.numel())

    @property
    def shape(self) -> tuple[int, ...]:
        """As `numel`."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    @property
    def first(self) -> int:
        """The place of its first element in the tensor `name`, flattened."""
        return 0 if self.experts is None else self.experts.start * (self.numel // len(self.experts))

    @property
    def copies(self) -> dist.ProcessGroup | None:
        """The ranks that have the same parameter; None: all."""
        return None if self.experts is None else _expert_data_parallel(self.parameter)

    @property
    def copy_count(self) -> int:
        """How many ranks have it."""
        return dist.get_world_size(self.copies)

    @property
    def copy_number(self) -> int:
        """Which of them this rank is, from 0."""
        return dist.get_rank(self.copies)


def placed(model: nn.Module) -> Iterator[Placed]:
    """All parameters of a model, distributed or not, in the same order on every rank."""
    first_experts: dict[str, int] = {}
    single: dict[int, Placed] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ExpertParallelMoE):
            first_experts[f"{prefix}.experts"] = module.ep_rank * module.num_local_experts
        elif isinstance(module, CapacityMoE):
            for number, expert in enumerate(module.local_experts, module.first_expert):
                for weight, parameter in expert.named_parameters():
                    name = f"{prefix}.experts.{weight}".removeprefix(_MODULE)
                    single[id(parameter)] = Placed(name, parameter, range(number, number + 1))
    for name, parameter in model.named_parameters():
        ours = one_process_name(name).removeprefix(_MODULE)
        if id(parameter) in single:
            yield single[id(parameter)]
        elif is_of_experts(ours):
            first = first_experts.get(name.rpartition(".")[0], 0)
            count = getattr(parameter, "ds_shape", parameter.shape)[0]
            yield Placed(ours, parameter, range(first, first + count))
        else:
            yield Placed(ours, parameter)


def _expert_data_parallel(expert: Any) -> dist.ProcessGroup:
    """The ranks with the same experts."""
    from deepspeed.utils import groups

    group: dist.ProcessGroup = groups._get_expert_data_parallel_group(expert.group_name)
    return group
