"""Sparse vision-language models. `from dsmoe_vl import load` opens a trained one, see docs/use.md; `SparseMoE` is the
sparse layer for other models, see docs/sparse_moe.md.

Names are imported lazily, on first access: `import dsmoe_vl` alone does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe_vl.inference.api import Model, load
    from dsmoe_vl.moe.expert_parallel import spread_experts
    from dsmoe_vl.moe.sparse_moe import SparseMoE, auxiliary_loss

__all__ = ["Model", "SparseMoE", "auxiliary_loss", "load", "spread_experts"]

_PLACES = {
    "Model": "dsmoe_vl.inference.api",
    "load": "dsmoe_vl.inference.api",
    "SparseMoE": "dsmoe_vl.moe.sparse_moe",
    "auxiliary_loss": "dsmoe_vl.moe.sparse_moe",
    "spread_experts": "dsmoe_vl.moe.expert_parallel",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
