"""Figures in README.md and docs/ come from result files, and say from which command, commit, machine and day."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import pytest

from benchmarks.record import RESULTS, ROOT, Machine, Result, typed
from benchmarks.summary import BLOCKS, PAGES, filled, read_results
from benchmarks.tables import COMMANDS, Table, block, cite

NOWHERE = Result("data", "python benchmarks/data.py", None, None, Machine(), {}, {})
HERE = Result(
    "data", "python benchmarks/data.py", "0123abc", "2026-01-02T03:04:05+00:00",
    Machine("Some CPU", 2, ["AVX2"], "1 x Some GPU"), {}, {},
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_result_files(page):
    """After a measurement, `python -m benchmarks.summary --write` puts its figures into the pages."""
    assert page.read_text() == filled(page.read_text(), read_results())


def test_every_table_stands_in_a_page():
    shown = {name for page in PAGES for name in re.findall("<!-- figures: (.*?) -->", page.read_text())}
    assert shown == set(BLOCKS)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_result_file_names_its_benchmark_and_no_path_of_a_machine(file):
    result = Result.read(file)
    assert result.benchmark in COMMANDS and result.figures
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|mnt)\b", file.read_text())


@pytest.mark.parametrize("name", BLOCKS)
def test_without_results_every_table_says_so(name):
    text = BLOCKS[name]({})
    assert "unverified" in text or "Not recorded yet" in text
    if name in ("speed", "train_step", "moe_cost", "monitoring"):
        assert "unverified on CUDA" in text


def test_a_source_says_what_was_not_recorded():
    assert cite(NOWHERE) == "`python benchmarks/data.py`; commit not recorded; date not recorded; machine not recorded"
    assert cite(HERE).endswith("commit 0123abc; 2026-01-02; Some CPU, 2 cores, AVX2, 1 x Some GPU")


def test_one_source_stands_below_and_several_in_a_column():
    table = Table("what", "figure")
    table.row(HERE, "a", "1")
    table.row(HERE, "b", "2")
    assert block(table).splitlines() == [
        "| what | figure |", "| --- | --- |", "| a | 1 |", "| b | 2 |", "", f"Source: {cite(HERE)}.",
    ]  # fmt: skip
    table.unverified("generate", "c")
    assert block(table).splitlines()[4:] == [
        "| c | unverified | 2 |", "", "Sources:", "", f"1. {cite(HERE)}",
        "2. not measured yet: `python benchmarks/generate.py`",
    ]  # fmt: skip


def test_a_marked_block_needs_a_known_name_and_an_end():
    page = "before\n<!-- figures: generate -->\nold\n<!-- end -->\nafter\n"
    new = filled(page, {})
    assert new.startswith("before\n<!-- figures: generate -->\n\n|") and new.endswith("\n\n<!-- end -->\nafter\n")
    assert "old" not in new and filled(new, {}) == new
    for wrong, message in [
        (page.replace("generate", "none"), "no figures are called none"),
        (page.replace("<!-- end -->", ""), "the figures generate have no <!-- end -->"),
    ]:
        with pytest.raises(SystemExit, match=message):
            filled(wrong, {})


def test_a_result_file_of_another_form_is_named(tmp_path):
    file = tmp_path / "old.json"
    for text in ("{}", "[", json.dumps({**asdict(HERE), "machine": {"colour": "red"}})):
        file.write_text(text)
        with pytest.raises(SystemExit, match=r"old\.json is not a result file"):
            read_results(tmp_path)
    HERE.write(file)
    assert read_results(tmp_path) == {"data": [HERE]}


def test_the_command_is_that_of_a_user_in_the_repository(monkeypatch):
    script = str(ROOT / "benchmarks/moe_cost.py")
    assert typed([script, "--json", "x.json", "--steps", "2"]) == "python benchmarks/moe_cost.py --steps 2"
    assert typed([script, "--recipe=/elsewhere/a.toml"]) == "python benchmarks/moe_cost.py --recipe=.../a.toml"
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = typed(["benchmarks/moe_cost.py", "--local_rank=0", "--json=x", "data.pack_length=512"])
    assert found == "deepspeed --num_accelerators 2 benchmarks/moe_cost.py data.pack_length=512"
