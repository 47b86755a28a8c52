"""Strict reading of a DeepSpeed JSON: a key that DeepSpeed would ignore, or that we do not support, is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_vl.config.deepspeed_keys import FIXED, REMOVED, SCHEDULERS, SECTIONS, UNSUPPORTED
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.errors import ConfigError

_OPTIMIZERS = ("Adam", "AdamW")
_POSITIVE_INTEGERS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "expert_parallel.autoep_size",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_num_steps",
)
_NON_NEGATIVE_NUMBERS = ("gradient_clipping", "optimizer.params.lr", "optimizer.params.weight_decay")
_FLAGS = ("bf16.enabled", "fp16.enabled", "expert_parallel.enabled", "tensorboard.enabled")
_STRINGS = ("optimizer.type", "scheduler.type", "tensorboard.output_path", "tensorboard.job_name")


def load_deepspeed(path: Path) -> dict[str, Any]:
    """The DeepSpeed configuration in a JSON file, checked by `check_deepspeed`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed JSON {path} cannot be read: {error.strerror}. ds_configs/ contains the shipped ones."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"DeepSpeed JSON {path} is not UTF-8 text: {error.reason}") from None
    try:
        config = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(_parse_error(path, text, error)) from None
    except ValueError as error:
        raise ConfigError(f"DeepSpeed JSON {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"DeepSpeed JSON {path} must contain one object: {{ ... }}")
    check_deepspeed(config, str(path))
    return config


def check_deepspeed(config: dict[str, Any], file: str) -> None:
    """Raises ConfigError, with `file`, for a key or value of `config` that DeepSpeed ignores or we do not support."""
    for path, value in _walk(config):
        _check_key(path, value, file)
    _check_types(config, file)
    _check_optimizer(config, file)
    _check_scheduler(config, file)
    _check_zero(config, file)


def setting(config: dict[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; `default` if it or a parent section is absent or null."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return default if value is None else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f'the key "{key}" is given twice in one section. Remove one of them.')
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number. Write a finite one.")


def _parse_error(path: Path, text: str, error: json.JSONDecodeError) -> str:
    lines = text.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    where = f"DeepSpeed JSON {path}, line {error.lineno}, column {error.colno}"
    if text[error.pos : error.pos + 1] in ("/", "#"):
        return f"{where}: comments are not JSON, remove this one: {line}"
    return f"{where}: {error.msg}: {line or 'the file ends here'}"


def _walk(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path with its value, each section before its own keys."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _check_key(path: str, value: Any, file: str) -> None:
    section, _, key = path.rpartition(".")
    if value == "auto":
        raise ConfigError(f'{path} = "auto" in {file} is not supported. Write the value itself.')
    if path in REMOVED:
        raise ConfigError(f"{path} in {file}: DeepSpeed 0.19 has removed this feature. Remove the key.")
    if path == "optimizer.params.max_grad_norm":
        raise ConfigError(f"{path} in {file}: DeepSpeed reads the top-level key instead. Set gradient_clipping.")
    if section in SECTIONS and key not in SECTIONS[section]:
        where = f"in section {section} of {file}" if section else f"at the top level of {file}"
        raise ConfigError(f"{key} {where} is not a DeepSpeed key. {did_you_mean(key, SECTIONS[section])}")
    if path in SECTIONS and not isinstance(value, dict):
        raise ConfigError(f"{path} = {json.dumps(value)} in {file} must be a section: {{ ... }}")
    if path in UNSUPPORTED and not _switched_off(value):
        raise ConfigError(f"{path} in {file} is not supported: {UNSUPPORTED[path]}.")
    if path in FIXED and value != FIXED[path][0]:
        only, reason = FIXED[path]
        raise ConfigError(f"{path} = {json.dumps(value)} in {file}: {reason}. Set it to {json.dumps(only)}.")


def _switched_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value.get("enabled", bool(value))
    return value in (None, False, 0, 1) and value is not True


def _check_types(config: dict[str, Any], file: str) -> None:
    expected = (
        (_POSITIVE_INTEGERS, "a whole number of at least 1", lambda value: type(value) is int and value >= 1),
        (_NON_NEGATIVE_NUMBERS, "a number of at least 0", lambda value: _is_number(value) and value >= 0),
        (_FLAGS, "true or false", lambda value: isinstance(value, bool)),
        (_STRINGS, "a string", lambda value: isinstance(value, str)),
    )
    for paths, wanted, fits in expected:
        for path in paths:
            value = setting(config, path)
            if value is not None and not fits(value):
                raise ConfigError(f"{path} = {json.dumps(value)} in {file} must be {wanted}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_optimizer(config: dict[str, Any], file: str) -> None:
    kind = setting(config, "optimizer.type")
    if kind not in _OPTIMIZERS:
        raise ConfigError(f"optimizer.type = {json.dumps(kind)} in {file} must be one of: {', '.join(_OPTIMIZERS)}")
    if not setting(config, "optimizer.params.lr"):
        raise ConfigError(f"optimizer.params.lr in {file} is missing or 0. Set the peak learning rate, such as 3e-4.")
    betas = setting(config, "optimizer.params.betas", [0.9, 0.999])
    if not (isinstance(betas, list) and len(betas) == 2 and all(_is_number(beta) and 0 <= beta < 1 for beta in betas)):
        raise ConfigError(
            f"optimizer.params.betas = {json.dumps(betas)} in {file} must be two numbers from 0 to below 1"
        )


def _check_scheduler(config: dict[str, Any], file: str) -> None:
    if "scheduler" not in config:
        return
    kind = setting(config, "scheduler.type")
    if kind not in SCHEDULERS:
        advice = did_you_mean(str(kind), SCHEDULERS)
        raise ConfigError(f"scheduler.type = {json.dumps(kind)} in {file} is not a DeepSpeed scheduler. {advice}")
    params = config["scheduler"].get("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f"scheduler.params = {json.dumps(params)} in {file} must be a section: {{ ... }}")
    for key in params:
        if key not in SCHEDULERS[kind]:
            raise ConfigError(
                f"{key} in scheduler.params of {file} is not a key of {kind}. {did_you_mean(key, SCHEDULERS[kind])}"
            )


def _check_zero(config: dict[str, Any], file: str) -> None:
    stage = setting(config, "zero_optimization.stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(f"zero_optimization.stage = {json.dumps(stage)} in {file} must be 0, 1, 2 or 3")
    for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = setting(config, f"zero_optimization.{section}.device", "none")
        place = f'zero_optimization.{section}.device = "{device}" in {file}'
        if device not in ("none", "cpu"):
            raise ConfigError(f'{place}: checkpoints of experts cannot be loaded with it. Set it to "cpu".')
        if device == "cpu" and stage < lowest:
            raise ConfigError(f"{place} needs zero_optimization.stage of at least {lowest}, not {stage}")
