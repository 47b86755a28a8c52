"""Whether hosts see the same data."""

from __future__ import annotations

import json

import pytest

from dsmoe_vl.data.copies import Copy, differences
from dsmoe_vl.data.shards.index import manifest_sha256
from dsmoe_vl.errors import DataError
from tests.support.tars import write_shards


def test_the_one_that_differs_from_most_is_named():
    copies = [Copy("node-1", {"a": "00", "b": "1"}, ()), Copy("node-2", {"a": "11", "b": "1"}, ())]
    copies.append(Copy("node-3", {"a": "11", "b": "1"}, ("no such file",)))
    [(copy, text)] = differences(copies)
    assert copy is copies[0]
    assert text.startswith("a is another on node-1 (sha256 00) than on node-2 (11): ")


def test_of_two_the_first_is_right():
    [(copy, _)] = differences([Copy("a", {"x": "0"}, ()), Copy("b", {"x": "1"}, ())])
    assert copy.who == "b"


def test_copies_without_differences():
    assert differences([Copy("a", {"x": "0"}, ()), Copy("b", {}, ("gone",))]) == []
    assert differences([]) == []


def test_the_form_of_a_manifest_does_not_count(tmp_path):
    folder = tmp_path / "shards"
    write_shards(folder, [4])
    manifest = folder / "index.json"
    before = manifest_sha256(folder)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=7))
    assert manifest_sha256(folder) == before
    manifest.unlink()
    scanned = manifest_sha256(folder)
    assert scanned != before
    next(folder.glob("*.tar")).write_bytes(b"shorter")
    assert manifest_sha256(folder) != scanned
    with pytest.raises(DataError, match="no such folder"):
        manifest_sha256(tmp_path / "none")
