"""The optimizer's state of one rank as ranges of the one-process model's tensors, so that any topology can read it.

ZeRO keeps fp32 weights and Adam's moments of a rank in flat buffers, and cuts parameters wherever a buffer ends. A
range says which elements of which tensor lie where, so a checkpoint needs neither DeepSpeed's files nor its layout.
What is read of the engine: `tests/unit/test_deepspeed_contract.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsmoe_vl.moe.placement import Placed, placed

MASTER = "master"  # the fp32 weight
MOMENTS = ("exp_avg", "exp_avg_sq")


class Range(NamedTuple):
    """Elements `start` to `stop` of the tensor `name`, flattened, that this rank updates.

    `values`: views into the engine's memory, fp32 [stop - start], by MASTER and MOMENTS; without moments before the
    first update. `placed`: the parameter that they are part of. `updates`: Adam's count of them.
    """

    name: str
    start: int
    stop: int
    values: dict[str, Tensor]
    placed: Placed
    updates: int = 0


def ranges(engine: Any) -> Iterator[Range]:
    """All that this rank updates. At ZeRO-0, where ranks update the same, each has a part of it."""
    copies, updates = _fp32_copies(engine), dict[nn.Parameter, int]()
    for where in placed(engine.module):
        found = _local(engine, where, copies)
        if found is None:
            continue
        flat, offset, start, count = found
        state = engine.basic_optimizer.state.get(flat, {})
        whole = {MASTER: flat.detach(), **{name: state[name] for name in MOMENTS if name in state}}
        values = {name: value.view(-1)[offset : offset + count] for name, value in whole.items()}
        first = where.first + start
        if flat not in updates:  # on a GPU, reading a number waits for it
            updates[flat] = int(state.get("step", 0))
        yield Range(where.name, first, first + count, values, where, updates[flat])


def own_share(found: Range) -> Range:
    """The part that this rank writes: all of it, or its share where other ranks have the same."""
    where, count = found.placed, found.stop - found.start
    divided = hasattr(where.parameter, "ds_id") or hasattr(where.parameter, "_hp_mapping")
    if divided or where.copy_count == 1:
        return found
    begin, end = (count * number // where.copy_count for number in (where.copy_number, where.copy_number + 1))
    values = {name: value[begin:end] for name, value in found.values.items()}
    return found._replace(start=found.start + begin, stop=found.start + end, values=values)


def frozen(engine: Any) -> Iterator[tuple[Range, Tensor]]:
    """All that this rank keeps and nobody updates: a range without values, and the model's memory for it."""
    for where in placed(engine.module):
        if not where.parameter.requires_grad:
            kept, start = where.parameter.data.view(-1), 0
            if hasattr(where.parameter, "ds_id"):  # ZeRO-3; its last part is longer than the values
                kept = where.parameter.ds_tensor.data.view(-1)
                start = where.parameter.ds_zero_partition_rank * len(kept)
                kept = kept[: max(where.numel - start, 0)]
            first = where.first + start
            yield Range(where.name, first, first + len(kept), {}, where), kept


def make_moments(engine: Any, updates: Mapping[str, int]) -> None:
    """Create the state that the optimizer would create in its first update, as after so many `updates` of the tensors
    with these names; 0 of those that are not there."""
    optimizer = engine.basic_optimizer
    copies, counts = _fp32_copies(engine), dict[nn.Parameter, int]()
    for where in placed(engine.module):
        found = _local(engine, where, copies)
        if found is not None:
            count = updates.get(where.name, 0)
            known = counts.setdefault(found[0], count)
            assert known == count, f"{where.name} shares its count of updates with a tensor of another"
    for flat in dict.fromkeys(_flats(engine)):
        count = counts.get(flat, 0)
        state = optimizer.state[flat]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        if isinstance(state.get("step", torch.tensor(0)), Tensor) and not _counts_in_python(optimizer):
            state["step"] = torch.tensor(float(count), dtype=torch.float32, device=flat.device)
        else:
            state["step"] = count


def after_loading(engine: Any) -> None:
    """Give the model the fp32 weights that were loaded into `ranges`. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        copies = _fp32_copies(engine)
        for where in placed(engine.module):
            if id(where.parameter) in copies:
                where.parameter.data.copy_(copies[id(where.parameter)].data)
        return  # in fp32 at ZeRO-0 the optimizer updates the model's parameters themselves
    for found in ranges(engine):
        partition = found.placed.parameter.ds_tensor
        partition.data[: found.stop - found.start].copy_(found.values[MASTER])
    if optimizer.persistent_parameters:  # small ones that every rank keeps whole
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _fp32_copies(engine: Any) -> dict[int, nn.Parameter]:
    """In bf16 at ZeRO-0: the fp32 copies that the optimizer updates, by the id of their parameter."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups") or engine.zero_optimization_stage() > 0:
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(one): copy for group, copies in pairs for one, copy in zip(group, copies, strict=True)}


def _local(engine: Any, where: Placed, copies: dict[int, nn.Parameter]) -> tuple[nn.Parameter, int, int, int] | None:
    """The optimizer's tensor with a parameter's elements, their place in it, the place of the first one in the
    parameter, and how many they are; None if this rank updates none of them."""
    parameter = where.parameter
    if not parameter.requires_grad:
        return None
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        optimizer = engine.optimizer
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = parameter.ds_zero_partition_rank * padded
        count = min(padded, parameter.ds_numel - start)
        return (optimizer.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2, and the bf16 optimizer
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        inner, outer = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, inner.start, outer.start, inner.numel
    return copies.get(id(parameter), parameter), 0, 0, parameter.numel()


def _flats(engine: Any) -> Iterator[nn.Parameter]:
    """The tensors that the optimizer updates."""
    if engine.zero_optimization_stage() == 3:
        yield from engine.optimizer.fp32_partitioned_groups_flat
        return
    for group in engine.basic_optimizer.param_groups:
        yield from group["params"]


def _counts_in_python(optimizer: Any) -> bool:
    """DeepSpeed's Adam for CPUs counts with an int."""
    return type(optimizer).__module__.startswith("deepspeed.")
