"""Initial values of all parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsmoe_vl.model.layers import IDENTITY
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.expert_names import expert_name
from dsmoe_vl.moe.placement import Placed, placed
from dsmoe_vl.moe.router import Router

EMBEDDING_STD = 0.02
_ROUTER_STD = 0.02  # near-even routing at the start
_CONVOLUTIONS = ("speech.conv1.weight", "speech.conv2.weight")
_FROM_PICTURES = ("connector.down.weight", "connector.place.weight", "connector.time.weight")
_INTO_RESIDUAL = ("attention.out.weight", "down.weight", "experts.w2", "mlp.w2")


def initialise(model: VisionLanguageModel, seed: int) -> None:
    """Fill every parameter, see `first_values`."""
    fill = first_values(model, seed)
    for where in placed(model):
        fill(where)


def first_values(model: VisionLanguageModel, seed: int, connector_scale: float = 1.0) -> Callable[[Placed], None]:
    """A function that fills one parameter. Matrices: normal with variance 1 / fan-in; those that write into the
    residual stream are divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3); what the decoder sees of
    pictures is times `connector_scale`. Biases zero, norm weights one.

    A parameter's values depend only on the seed and its name; an expert's also on its number, so that a rank can fill
    its own alone. A module's OWN_START has the values of parameters that start otherwise.
    """
    depth = {"vision": len(model.vision.layers), "layers": len(model.layers)}
    if model.speech is not None:
        depth["speech"] = len(model.speech.layers)
    gates = [m for m in model.modules() if isinstance(m, Router)]
    # In mode "task", equal biases would send every task to the same experts.
    routers = {id(m.task_bias if m.mode == "task" else m.weight) for m in gates} | {id(m.weight) for m in gates}
    own_start = {
        id(getattr(m, name)): value for m in model.modules() for name, value in getattr(m, "OWN_START", {}).items()
    }

    def std_of(where: Placed) -> float:
        if id(where.parameter) in routers:
            return _ROUTER_STD
        if where.parameter is model.embedding.weight or where.parameter is model.head.weight:
            return EMBEDDING_STD
        fan_in = where.shape[-2] * where.shape[-1] if where.name in _CONVOLUTIONS else where.shape[-1]
        std = fan_in**-0.5
        if "layers" in where.name and where.name.endswith(_INTO_RESIDUAL):
            std /= (2 * depth[where.name.split(".")[0]]) ** 0.5
        if where.name in _FROM_PICTURES:
            std *= connector_scale
        return std

    @torch.no_grad()
    def fill(where: Placed) -> None:
        name, parameter = where.name, where.parameter
        if id(parameter) in own_start:
            start = own_start[id(parameter)]
            nn.init.eye_(parameter) if start == IDENTITY else nn.init.constant_(parameter, start)
        elif parameter.dim() == 1 and name.endswith("weight"):  # of a norm
            nn.init.ones_(parameter)
        elif name.endswith("bias") and id(parameter) not in routers:
            nn.init.zeros_(parameter)
        elif where.experts is None:
            _fill_normal(parameter, std_of(where), f"{seed}:{name}")
        else:
            of_experts = parameter if parameter.dim() == 3 else parameter.unsqueeze(0)
            for number, matrix in zip(where.experts, of_experts, strict=True):
                _fill_normal(matrix, std_of(where), f"{seed}:{expert_name(name, number)}")

    return fill


def _fill_normal(values: Tensor, std: float, name: str) -> None:
    values.normal_(0.0, std, generator=generator_of(name))


def generator_of(name: str) -> torch.Generator:
    """Random numbers that follow from a name alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
