"""The layers that `moe_layer.py` compares, made of the same weights. Each has its fastest form.

Shapes: T tokens, D width, F hidden width of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from dsmoe_vl.config.task_table import TASKS
from dsmoe_vl.data.segment import Modality
from dsmoe_vl.model.layers import SwiGLU
from dsmoe_vl.moe.expert_parallel import _spec, spread_experts
from dsmoe_vl.moe.sparse_moe import SparseMoE
from dsmoe_vl.parallel.ranks import Ranks


class NotRunError(Exception):
    """A layer that this installation, or this number of ranks, cannot run; says why."""


@dataclass(frozen=True)
class Shape:
    """A sparse layer: D, F, E and K."""

    width: int
    ffn_width: int
    experts: int
    top_k: int


# Both have the same active FLOPs: a few wide experts, or many narrow ones as in Qwen3-MoE and DeepSeek-V3.
SHAPES = {"coarse": Shape(256, 512, 8, 2), "fine": Shape(256, 128, 64, 8)}
# Of a GPU; the fine one is the layer of Qwen3-30B-A3B.
GPU_SHAPES = {"coarse": Shape(2048, 3072, 8, 2), "fine": Shape(2048, 768, 128, 8)}


@dataclass
class Layer:
    """A module and how it is called: [T, D] -> [T, D]. `form`: which of several forms it is, where there are."""

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    form: str = ""


def weights(shape: Shape) -> SparseMoE:
    """Our layer on one process, with the weights that all layers get: the same at every call and on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparseMoE(
            shape.width, shape.experts, len(TASKS), num_modalities=len(Modality), top_k=shape.top_k,
            ffn_width=shape.ffn_width,
        )  # fmt: skip


def dense(source: SparseMoE, shape: Shape, ranks: Ranks) -> Layer:
    """As wide as a token's experts together."""
    layer = SwiGLU(shape.width, shape.top_k * shape.ffn_width)
    return Layer(layer, layer)


def ours(source: SparseMoE, shape: Shape, ranks: Ranks) -> Layer:
    """Tokens of several tasks and modalities, as in training."""
    spread_experts(source, ranks.world_size, ranks.rank)
    source.layer.set_deepspeed_parallelism()
    ids: dict[int, Tensor] = {}

    def run(x: Tensor) -> Tensor:
        numbers = ids.setdefault(len(x), torch.arange(len(x), device=x.device))
        out: Tensor = source(x, numbers % len(TASKS), numbers % len(Modality))[0]
        return out

    return Layer(source, run)


def autoep(**settings: Any) -> Callable[[SparseMoE, Shape, Ranks], Layer]:
    """DeepSpeed's AutoEP layer, as DeepSpeed makes it of a model's own sparse block."""

    def build(source: SparseMoE, shape: Shape, ranks: Ranks) -> Layer:
        config = AutoEPConfig(enabled=True, autoep_size=ranks.world_size, **settings)
        layer: Any = AutoEPMoELayer(_spec(source.layer), source.layer, ranks.world_size, ranks.rank, config)
        layer.set_deepspeed_parallelism()
        return Layer(layer, lambda x: layer(x.unsqueeze(0)).squeeze(0))

    return build


def classic(**settings: Any) -> Callable[[SparseMoE, Shape, Ranks], Layer]:
    """DeepSpeed's classic MoE layer. Its second expert is not drawn at random, else it would compute something else."""

    def build(source: SparseMoE, shape: Shape, ranks: Ranks) -> Layer:
        experts: Any = source.layer.experts
        layer: Any = MoE(
            shape.width, experts.single(), shape.experts, ranks.world_size, shape.top_k,
            top2_2nd_expert_sampling=False, **settings,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()
        first = ranks.rank * layer.num_local_experts
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight.copy_(source.layer.router.weight)
            for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts, first):
                for name, parameter in expert.named_parameters():
                    parameter.copy_(getattr(experts, name)[index])
        return Layer(layer, lambda x: layer(x)[0])

    return build


def transformers(form: str) -> Callable[[SparseMoE, Shape, Ranks], Layer]:
    """The sparse block of Qwen3-MoE."""

    def build(source: SparseMoE, shape: Shape, ranks: Ranks) -> Layer:
        if ranks.world_size > 1:
            raise NotRunError("its expert parallelism gives all ranks the same tokens")
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=shape.width, moe_intermediate_size=shape.ffn_width, num_experts=shape.experts,
            num_experts_per_tok=shape.top_k, norm_topk_prob=True, experts_implementation=form,
        )  # fmt: skip
        block: Any = Qwen3MoeSparseMoeBlock(config)
        experts: Any = source.layer.experts
        with torch.no_grad():
            block.gate.weight.copy_(source.layer.router.weight)
            block.experts.gate_up_proj.copy_(torch.cat((experts.w1, experts.w3), dim=1))
            block.experts.down_proj.copy_(experts.w2)
        return Layer(block, lambda x: block(x.unsqueeze(0)).squeeze(0))

    return build


def lost(layer: Layer, x: Tensor) -> Tensor:
    """Which assignments the classic layer drops: bool [T, K]."""
    module: Any = layer.module
    with torch.no_grad():
        _, _, _, experts, *_ = module.deepspeed_moe.gate(x, None, True)
    return experts.t() < 0


DENSE, OURS, CAPACITY = "dense", "ours", "DeepSpeed MoE, capacity 1.25"
# Each layer's forms, of which the fastest is reported: which it is depends on the shape and on the machine. Left out is
# what cannot win or cannot run on a CPU: transformers' batched_mm copies a matrix for every row, the others' fused
# kernels are Triton's. DeepSpeed's `use_tutel` needs a package that is built for CUDA only.
PATHS: dict[str, dict[str, Callable[[SparseMoE, Shape, Ranks], Layer]]] = {
    OURS: {"": ours},
    "AutoEP, grouped products": {
        "gate and up apart, as shipped": autoep(),
        "gate and up in one product": autoep(gate_up_impl="fused"),
    },
    "AutoEP, loop over experts": {"": autoep(use_grouped_mm=False)},
    CAPACITY: {"": classic(capacity_factor=1.25)},
    "DeepSpeed MoE, dropless": {"": classic(drop_tokens=False)},
    "transformers, Qwen3-MoE": {"grouped_mm": transformers("grouped_mm"), "eager": transformers("eager")},
    DENSE: {"": dense},
}
