"""Initial values of all parameters."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.moe.router import Router

_EMBEDDING_STD = 0.02
_ROUTER_STD = 0.02  # near-even routing at the start


@torch.no_grad()
def initialise(model: VisionLanguageModel, seed: int) -> None:
    """Fill every parameter. Matrices: normal with variance 1 / fan-in; those that write into the residual stream are
    divided by sqrt(2 * layers) (Radford et al. 2019, section 2.3). Biases zero, norm weights one.

    A parameter's values depend only on the seed and its name. Those in a module's OWN_START are left as they are.
    """
    depth = {"vision": len(model.vision.layers), "layers": len(model.layers)}
    gates = [m for m in model.modules() if isinstance(m, Router)]
    # In mode "task", equal biases would send every task to the same experts.
    routers = {id(m.task_bias if m.mode == "task" else m.weight) for m in gates} | {id(m.weight) for m in gates}
    own_start = {id(getattr(m, name)) for m in model.modules() for name in getattr(m, "OWN_START", ())}
    for name, parameter in model.named_parameters():
        if id(parameter) in own_start:
            continue
        if parameter.dim() == 1 and name.endswith("weight"):  # of a norm
            nn.init.ones_(parameter)
        elif name.endswith("bias") and id(parameter) not in routers:
            nn.init.zeros_(parameter)
        else:
            std = parameter.shape[-1] ** -0.5
            if id(parameter) in routers:
                std = _ROUTER_STD
            elif parameter is model.embedding.weight:
                std = _EMBEDDING_STD
            elif name.endswith(("attention.out.weight", "down.weight", "experts.w2", "mlp.w2")) and "layers" in name:
                std /= (2 * depth[name.split(".")[0]]) ** 0.5
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            parameter.normal_(0.0, std, generator=generator)
