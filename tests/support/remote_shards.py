"""Reading remote shards in tests: settings, and what is in the cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from dsmoe_vl.config.recipe import DataConfig
from tests.support.loading import DATA


def remote_data(cache: Path) -> DataConfig:
    """Settings of a stream of remote shards."""
    return dataclasses.replace(
        DATA, cache=str(cache), fetch_patience_seconds=20.0, allow_pipe=True, max_bad_fraction=0.9
    )


def impatient(data: DataConfig, seconds: float = 0.3) -> DataConfig:
    """The same settings, with a server that fails given up after `seconds`."""
    return dataclasses.replace(data, fetch_patience_seconds=seconds)


def cached(data: DataConfig) -> list[str]:
    """Names of the shards in the cache."""
    return sorted(path.name[17:] for path in Path(data.cache).glob("*/*-*") if path.parent.name != "locks")


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
