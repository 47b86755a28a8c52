"""Keeps PyTorch's compiler out of a process: nothing here is compiled, and its import takes two to three seconds of
every rank's start. With `run.recompute`, PyTorch imports it in the first step after all."""

from __future__ import annotations

import importlib
import inspect

import torch
from deepspeed.runtime import compiler

# Functions that import the compiler when they are first called, to tell it to leave them alone.
_LEFT_ALONE = (
    torch.optim.Optimizer.add_param_group,
    torch.optim.Optimizer.load_state_dict,
    torch.optim.Optimizer.state_dict,
    torch.optim.Optimizer.zero_grad,
)


def leave_out_compiler() -> None:
    """Call it before the engine is built."""
    for function in _LEFT_ALONE:
        plain = getattr(function, "__wrapped__", function)
        setattr(plain, "__dynamo_disable", plain)
    # Around this one PyTorch marks where graphs end, and sets whether gradients are made, which no plan asks for.
    torch.optim.AdamW.step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))  # type: ignore[method-assign]
    _skip_compiling_muon()


def _skip_compiling_muon() -> None:
    """Import DeepSpeed's Muon without torch.compile: every engine imports it, only to ask whether it is the optimizer.
    No plan has it."""
    usual = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = usual
