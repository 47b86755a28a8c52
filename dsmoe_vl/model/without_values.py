"""Modules that have shapes and types, but no memory and no values yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_RANDOM = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, torch.Tensor.normal_, torch.Tensor.uniform_)


class _NothingRandom(TorchFunctionMode):
    """PyTorch's modules draw their first values where they are made. For a tensor without memory that does nothing, but
    imports PyTorch's compiler, which takes three seconds."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _RANDOM and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
            return tensor
        return function(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are made in this context are on the device `meta`."""
    with torch.device("meta"), _NothingRandom():
        yield
