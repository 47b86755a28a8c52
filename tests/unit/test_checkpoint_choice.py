"""Which checkpoint a run continues from, after each kind of damage to each of its files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from typing import Any

import pytest

from dsmoe_vl.checkpoint.choice import newest_sound
from dsmoe_vl.checkpoint.manifest import read_manifest
from dsmoe_vl.checkpoint.store import CHECKPOINTS_NAME, prune, remove_unfinished
from dsmoe_vl.checkpoint.tensor_files import file_entry
from dsmoe_vl.errors import CheckpointError, as_user_error
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.parallel.ranks import Ranks

ONE = Ranks(0, 1, 0)


@dataclass
class Host:
    """Stands for the collectives of one rank, or of those that answer as `others` say."""

    others: tuple[Any, ...] = ()

    def gather(self, value):
        return [value, *self.others]


@pytest.fixture
def checkpoints(trained, tmp_path):
    """Of a run with three sound checkpoints."""
    return shutil.copytree(trained / CHECKPOINTS_NAME, tmp_path / "run" / CHECKPOINTS_NAME)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = {"flipped bit": flip, "zeros": zero, "cut short": lambda file: os.truncate(file, 3), "missing": os.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_each_file_is_seen(checkpoints, damage):
    newest = checkpoints / "step_00000024"
    names = sorted(path.name for path in newest.iterdir())
    kinds = {name.partition("-")[0].partition(".")[0] for name in names}
    assert kinds == {"model", "optimizer", "data", "trainer", "tokenizer", "manifest"}
    for name in names:
        before = (newest / name).read_bytes()
        DAMAGES[damage](newest / name)
        found, notes = newest_sound(checkpoints, ONE, Host())
        assert found is not None and found[0].name == "step_00000016", name
        assert "step_00000024 is passed over" in notes[0]
        (newest / name).write_bytes(before)
    found, notes = newest_sound(checkpoints, ONE, Host())
    assert found is not None and found[0] == newest and notes == []


def test_none_is_left(checkpoints):
    for folder in checkpoints.glob("step_*"):
        flip(folder / "trainer.json")
    with pytest.raises(CheckpointError, match="has none that can be resumed: restore one, or start anew with --fresh"):
        newest_sound(checkpoints, ONE, Host())


def test_a_lost_manifest_of_the_newest_does_not_remove_it(checkpoints):
    for folder in checkpoints.glob("step_*"):
        (folder / "manifest.json").unlink()
    assert remove_unfinished(checkpoints) == ["step_00000008", "step_00000016"]
    with pytest.raises(CheckpointError, match="had a complete checkpoint, step_00000024"):
        newest_sound(checkpoints, ONE, Host())


def test_nothing_was_ever_saved(tmp_path):
    assert newest_sound(tmp_path / "checkpoints", ONE, Host()) == (None, [])


def test_hosts_that_see_other_checkpoints(checkpoints):
    with pytest.raises(CheckpointError, match=r"rank 1 on b and rank 0 on .* differ in step_00000008, .*: set run"):
        newest_sound(checkpoints, ONE, Host((("b", {}),)))


def test_every_nth_checkpoint_is_kept(checkpoints):
    prune(checkpoints, keep=1, keep_every=8)
    assert len(list(checkpoints.glob("step_*"))) == 3
    prune(checkpoints, keep=1, keep_every=16)
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000016", "step_00000024"]
    prune(checkpoints, keep=1)
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000024"]


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_pickle_is_loaded(trained, tmp_path, monkeypatch):
    """A payload in place of any file of a checkpoint, which its manifest vouches for: refused, and not run."""
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(trained, tmp_path / "run")
    newest = run / CHECKPOINTS_NAME / "step_00000024"
    for name in sorted(path.name for path in newest.iterdir() if path.name != "manifest.json"):
        manifest, before = (newest / "manifest.json").read_text(), (newest / name).read_bytes()
        (newest / name).write_bytes(pickle.dumps(Payload()))
        raw = json.loads(manifest)
        raw["files"][name] = file_entry(newest / name)
        (newest / "manifest.json").write_text(json.dumps(raw))
        assert read_manifest(newest) is not None
        if name.startswith(("model", "tokenizer")):
            with pytest.raises(Exception) as caught:
                load_run(run)
            assert as_user_error(caught.value) is not None, (name, caught.value)
        assert not (tmp_path / "ran").exists()
        (newest / "manifest.json").write_text(manifest)
        (newest / name).write_bytes(before)
