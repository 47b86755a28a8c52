"""Fixtures that every test may use."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import pytest

from tests.support.runs import SHOWS_SAMPLES, TinyProject, deepspeed_command, finish, start

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photos, captions and videos beside the repository; tests that need them skip where they are absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data: real photos and videos were not checked")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """Shards, tokenizer and recipe of a model that trains a step in a tenth of a second."""
    return TinyProject.create(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tiny: TinyProject) -> Path:
    """The directory of a run of the tiny recipe, by the deepspeed launcher on two ranks. Not to be changed."""
    run = tiny.folder / "runs" / "trained"
    result = finish(start(deepspeed_command(tiny.arguments(run, SHOWS_SAMPLES))))
    (tiny.folder / "trained.out").write_text(result.out)
    assert result.status == 0, result.out + result.err
    return run


def pytest_unconfigure(config: pytest.Config) -> None:
    """A thread or a process that a test left behind must not keep the whole run waiting."""
    if hasattr(config, "workerinput"):  # of pytest-xdist: it waits for the other one, which may take minutes
        return
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
