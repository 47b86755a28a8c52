"""Sparse vision-language models. `from dsmoe_vl import load` opens a trained one; see docs/use.md.

Names are imported lazily, on first access: `import dsmoe_vl` alone does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsmoe_vl.inference.api import Model, load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("dsmoe_vl.inference.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
