"""A folder of shards, a server that offers it, and settings with a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import DataConfig
from dsmoe_vl.data.shards import remote
from tests.support.loading import COUNTS
from tests.support.remote_shards import remote_data
from tests.support.tars import write_shards
from tests.support.web import Web, serving


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "served" / "a", COUNTS)


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serving(folder.parent) as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return remote_data(tmp_path / "cache")
