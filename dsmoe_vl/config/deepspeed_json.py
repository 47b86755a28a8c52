"""Strict reading of a DeepSpeed JSON: a key that DeepSpeed would ignore, or that we do not support, is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_vl.config.deepspeed_keys import AUTO, FIXED, NEEDED, REMOVED, SCHEDULERS, SECTIONS, UNSUPPORTED
from dsmoe_vl.config.deepspeed_values import BF16, FP32, OF_SCHEDULE, Wanted, is_number, wanted_at
from dsmoe_vl.config.suggest import did_you_mean
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import require_regular

_OPTIMIZERS = ("Adam", "AdamW")
_DEEPEST = 20  # sections within sections; DeepSpeed has four
_DIGITS = 1000  # of a whole number
_SHOWN = 60  # characters of a value


def load_deepspeed(path: Path) -> dict[str, Any]:
    """The DeepSpeed configuration in a JSON file, checked by `check_deepspeed`. Raises ConfigError."""
    try:
        text = require_regular(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed JSON {path} cannot be read: {error.strerror}. ds_configs/ contains the shipped ones."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"DeepSpeed JSON {path} is not UTF-8 text: {error.reason}") from None
    try:
        config = json.loads(
            text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant, parse_int=_whole_number
        )
    except json.JSONDecodeError as error:
        raise ConfigError(_parse_error(path, text, error)) from None
    except ValueError as error:
        raise ConfigError(f"DeepSpeed JSON {path}: {error}") from None
    except RecursionError:
        raise ConfigError(_too_deep(f"DeepSpeed JSON {path}")) from None
    if not isinstance(config, dict):
        raise ConfigError(f"DeepSpeed JSON {path} must contain one object: {{ ... }}")
    check_deepspeed(config, str(path))
    return config


def check_deepspeed(config: dict[str, Any], file: str) -> None:
    """Raises one ConfigError for all keys and values that DeepSpeed would ignore or that are not supported."""
    if _is_too_deep(config):
        raise ConfigError(_too_deep(file))
    checks = (
        _key_problems, _type_problems, _optimizer_problems, _scheduler_problems, _zero_problems, _precision_problems,
    )  # fmt: skip
    found = list(dict.fromkeys(problem for check in checks for problem in check(config, file)))
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError("\n  - ".join([f"{len(found)} problems in {file}:", *found]))


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


def _whole_number(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:20]}..., is no setting. Write a smaller one.")
    return int(digits)


def _parse_error(path: Path, text: str, error: json.JSONDecodeError) -> str:
    lines = text.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    where = f"DeepSpeed JSON {path}, line {error.lineno}, column {error.colno}"
    if text[error.pos : error.pos + 1] in ("/", "#"):
        return f"{where}: comments are not JSON, remove this one: {line}"
    return f"{where}: {error.msg}: {line or 'the file ends here'}"


def _is_too_deep(config: dict[str, Any]) -> bool:
    level: list[Any] = [config]
    for _ in range(_DEEPEST):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    return bool(level)


def _too_deep(place: str) -> str:
    return f"{place}: more than {_DEEPEST} sections or lists within each other. DeepSpeed has four. Remove them."


def _shown(value: Any) -> str:
    """A value as JSON; of a long one, the beginning."""
    try:
        text = json.dumps(value)
    except ValueError:  # Python does not write whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _walk(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path with its value, each section before its own keys."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _key_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    for path, value in _walk(config):
        if problem := _key_problem(path, value, file):
            yield problem


def _key_problem(path: str, value: Any, file: str) -> str:
    """What is wrong with one key; "" if nothing is."""
    section, _, key = path.rpartition(".")
    if path in REMOVED:
        return f"{path} in {file}: DeepSpeed 0.19 has removed this feature. Remove the key."
    if path == "optimizer.params.max_grad_norm":
        return f"{path} in {file}: DeepSpeed reads the top-level key instead. Set gradient_clipping."
    if section in SECTIONS and key not in SECTIONS[section]:
        where = f"in section {section} of {file}" if section else f"at the top level of {file}"
        return f"{key} {where} is not a DeepSpeed key. {did_you_mean(key, SECTIONS[section])}"
    if value == "auto":
        return f'{path} = "auto" in {file} is not supported. {AUTO.get(path, "Write the value itself")}.'
    if path in UNSUPPORTED and not _switched_off(value):
        return f"{path} in {file} is not supported: {UNSUPPORTED[path]}."
    if path in FIXED and value != FIXED[path][0]:
        only, reason = FIXED[path]
        return f"{path} = {_shown(value)} in {file}: {reason}. Set it to {json.dumps(only)}."
    return ""


def _switched_off(value: Any) -> bool:
    if isinstance(value, dict):
        return not value.get("enabled", bool(value))
    return value in (None, False, 0, 1) and value is not True


def _type_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    """Values of the wrong type or range. "auto" and switched off features have been dealt with."""
    for path, value in _walk(config):
        section, _, key = path.rpartition(".")
        kind = SECTIONS.get(section, {}).get(key)
        if kind is None or value is None or value == "auto" or (path in UNSUPPORTED and _switched_off(value)):
            continue  # null is as good as no key
        if problem := _value_problem(path, value, wanted_at(path, kind), file):
            yield problem


def _value_problem(path: str, value: Any, wanted: Wanted, file: str) -> str:
    if wanted.fits(value):
        return ""
    too_large = " of 64 bits" if type(value) is int and not is_number(value) else ""
    return f"{path} = {_shown(value)} in {file} must be {wanted.text}{too_large}{_unquoted(value, wanted)}"


def _unquoted(value: Any, wanted: Wanted) -> str:
    """Advice for a value that fits once its quotes are gone."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            return ""
        if wanted.fits(inner):
            return f": write {value} without quotes"
    return ""


def _optimizer_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    kind = setting(config, "optimizer.type")
    if kind not in _OPTIMIZERS:
        yield f"optimizer.type = {_shown(kind)} in {file} must be one of: {', '.join(_OPTIMIZERS)}"
    if not setting(config, "optimizer.params.lr"):
        yield f"optimizer.params.lr in {file} is missing or 0. Set the peak learning rate, such as 3e-4."
    betas = setting(config, "optimizer.params.betas", [0.9, 0.999])
    if isinstance(betas, list) and not (len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
        yield f"optimizer.params.betas = {_shown(betas)} in {file} must be two numbers from 0 to below 1"


def _scheduler_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    if not isinstance(config.get("scheduler"), dict):
        return
    kind = setting(config, "scheduler.type")
    if not isinstance(kind, (str, type(None))):  # which is told as a wrong type
        return
    if kind not in SCHEDULERS:
        advice = did_you_mean(str(kind), SCHEDULERS)
        yield f"scheduler.type = {_shown(kind)} in {file} is not a DeepSpeed scheduler. {advice}"
        return
    params = setting(config, "scheduler.params", {})
    if not isinstance(params, dict):
        return
    for key, value in params.items():
        if key not in SCHEDULERS[kind]:
            yield f"{key} in scheduler.params of {file} is not a key of {kind}. {did_you_mean(key, SCHEDULERS[kind])}"
        elif value not in (None, "auto") and (
            problem := _value_problem(f"scheduler.params.{key}", value, OF_SCHEDULE[key], file)
        ):
            yield problem
    for key in NEEDED.get(kind, ()):
        if params.get(key) is None:
            yield f"scheduler.params.{key} is missing in {file}: {kind} needs it. Set a learning rate, such as 3e-4."


def _zero_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    stage = setting(config, "zero_optimization.stage", 0)
    if type(stage) is not int or stage not in range(4):
        if stage != "auto":
            yield f"zero_optimization.stage = {_shown(stage)} in {file} must be 0, 1, 2 or 3"
        return
    for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = setting(config, f"zero_optimization.{section}.device", "none")
        place = f"zero_optimization.{section}.device = {_shown(device)} in {file}"
        if device not in ("none", "cpu"):
            yield f'{place}: checkpoints with experts cannot be loaded from there. Set it to "cpu".'
        elif device == "cpu" and stage < lowest:
            yield f"{place} needs zero_optimization.stage of at least {lowest}, not {stage}"


def _precision_problems(config: dict[str, Any], file: str) -> Iterator[str]:
    """Gradients in a precision that DeepSpeed does not add up for the precision of the weights."""
    kind = setting(config, "data_types.grad_accum_dtype")
    if not isinstance(kind, str):
        return
    place, is_bf16 = f"data_types.grad_accum_dtype = {_shown(kind)} in {file}", setting(config, "bf16.enabled") is True
    if kind in BF16 and not is_bf16:
        yield f"{place} needs bf16.enabled = true: fp32 weights have fp32 gradients. Remove the key."
    if kind in FP32 and is_bf16 and setting(config, "zero_optimization.stage", 0) == 0:
        yield f"{place} needs zero_optimization.stage of at least 1 with bf16. Remove the key, or set the stage."
