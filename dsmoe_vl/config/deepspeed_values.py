"""What the values of DeepSpeed's keys must be: ranges and choices, beyond the kinds of `config/deepspeed_keys.py`.

Where DeepSpeed has a range or choices, a test compares; it checks most of them only after every process has started.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from dsmoe_vl.config.deepspeed_keys import Kind

# Names of a precision in data_types.grad_accum_dtype.
FP32 = ("fp32", "float32", "float", "torch.float32")
BF16 = ("bf16", "bfloat16", "torch.bfloat16")
_LARGEST = 2**63 - 1  # of whole numbers: torch and DeepSpeed keep them in 64 bits


class Wanted(NamedTuple):
    """What a value must be, in words and as a test."""

    text: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of 64 bits."""
    if type(value) is int:
        return abs(value) <= _LARGEST
    return type(value) is float and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value) and abs(value) <= _LARGEST


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _whole(least: int, most: int = _LARGEST) -> Wanted:
    """A whole number, also one such as 5e8."""
    limit = "" if most == _LARGEST else f" and at most {most:,}"
    return Wanted(
        f"a whole number of at least {least}{limit}", lambda value: _is_whole(value) and least <= value <= most
    )


def _strictly_whole(least: int, most: int = _LARGEST) -> Wanted:
    """A whole number that is written as one."""
    wanted = _whole(least, most)
    return Wanted(wanted.text, lambda value: type(value) is int and wanted.fits(value))


def _between(least: float, most: float) -> Wanted:
    return Wanted(f"a number from {least:g} to {most:g}", lambda value: is_number(value) and least <= value <= most)


def _one_of(*choices: str, any_case: bool = True) -> Wanted:
    def fits(value: Any) -> bool:
        return isinstance(value, str) and (value.lower() if any_case else value) in choices

    return Wanted(f"one of: {', '.join(choices)}", fits)


_FLAG = Wanted("true or false", lambda value: isinstance(value, bool))
_NUMBER = Wanted("a number", is_number)
_NOT_NEGATIVE = Wanted("a number of at least 0", lambda value: is_number(value) and value >= 0)
_POSITIVE = Wanted("a number above 0", lambda value: is_number(value) and value > 0)
_PRECISION = _one_of("fp16", "bf16", "fp32")

OF_KIND: dict[Kind, Wanted] = {
    "flag": _FLAG,
    "integer": Wanted("a whole number", _is_whole),
    "number": _NUMBER,
    "string": Wanted("a string", lambda value: isinstance(value, str)),
    "strings": Wanted("a string, or a list of strings", _is_texts),
    "list": Wanted("a list: [ ... ]", lambda value: isinstance(value, list)),
    "section": Wanted("a section: { ... }", lambda value: isinstance(value, dict)),
    "any": Wanted("anything", lambda value: True),
}

_MOST_PACKS = 10**6  # of a micro-step or accumulation: more is a slip of the keys

_ZERO_3_SIZES = (
    "max_live_parameters", "max_reuse_distance", "model_persistence_threshold", "param_persistence_threshold",
    "prefetch_bucket_size",
)  # fmt: skip
_ZERO_SIZES = (
    *_ZERO_3_SIZES, *(f"stage3_{name}" for name in _ZERO_3_SIZES),
    "offload_optimizer.buffer_count", "offload_param.buffer_count", "offload_param.buffer_size",
    "offload_param.max_in_cpu",
)  # fmt: skip

# By dotted path.
AT: dict[str, Wanted] = {
    "train_batch_size": _strictly_whole(1),
    "train_micro_batch_size_per_gpu": _strictly_whole(1, _MOST_PACKS),
    "gradient_accumulation_steps": _strictly_whole(1, _MOST_PACKS),
    "expert_parallel.autoep_size": _strictly_whole(1),
    "steps_per_print": _strictly_whole(1),
    "gradient_clipping": _NOT_NEGATIVE,
    "gradient_predivide_factor": _POSITIVE,
    "communication_data_type": _PRECISION,
    "seq_parallel_communication_data_type": _PRECISION,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "optimizer.params.lr": _NOT_NEGATIVE,
    "optimizer.params.weight_decay": _NOT_NEGATIVE,
    "optimizer.params.eps": _POSITIVE,
    "data_types.grad_accum_dtype": _one_of(*FP32, *BF16, any_case=False),
    "checkpoint.tag_validation": _one_of("ignore", "warn", "fail"),
    "checkpoint.writer.type": _one_of("mock", "python", "fast"),
    "checkpoint.writer.data_parallel": _one_of("replica", "socket", "machine"),
    "checkpoint.writer.io_buffer_size": _whole(1),
    "comet.samples_log_interval": _whole(1),
    "flops_profiler.recompute_fwd_factor": _NOT_NEGATIVE,
    "zero_optimization.reduce_bucket_size": _whole(1),
    "zero_optimization.allgather_bucket_size": _whole(1),  # DeepSpeed lets 0 pass, and divides by it
    "zero_optimization.sub_group_size": _whole(1),
    "zero_optimization.offload_optimizer.ratio": _between(0, 1),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _between(0, 1),
    **{f"zero_optimization.{name}": _whole(0) for name in _ZERO_SIZES},
    **{f"aio.{name}": _whole(1) for name in ("block_size", "queue_depth", "intra_op_parallelism")},
}

# By key of scheduler.params.
OF_SCHEDULE: dict[str, Wanted] = {
    **dict.fromkeys(("total_num_steps", "warmup_num_steps", "lr_range_test_step_size"), _strictly_whole(1)),
    **dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "lr_range_test_min_lr"), _NOT_NEGATIVE),
    **dict.fromkeys(("cycle_min_lr", "cycle_max_lr", "decay_lr_rate", "decay_mom_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup_min_ratio", "cos_min_ratio", "cycle_min_mom", "cycle_max_mom"), _between(0, 1)),
    **dict.fromkeys(("cycle_second_step_size", "decay_step_size"), _whole(0)),
    **dict.fromkeys(("cycle_first_stair_count", "cycle_second_stair_count"), _whole(0)),
    **dict.fromkeys(("lr_range_test_staircase", "cycle_momentum"), _FLAG),
    "cycle_first_step_size": _whole(1),
    "lr_range_test_step_rate": _NUMBER,
    "warmup_type": _one_of("log", "linear", any_case=False),
    "last_batch_iteration": Wanted("-1: the checkpoint has the place in the schedule", lambda value: value == -1),
}


def wanted_at(path: str, kind: Kind) -> Wanted:
    """What the value at a dotted path must be."""
    return AT.get(path, OF_KIND[kind])
