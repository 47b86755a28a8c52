"""The pages for people: what they name exists. Files move more often than somebody reads every page again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest

from dsmoe_vl.config.recipe import Recipe
from tests.unit.test_layers import ORDER

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TRANSLATIONS = [page for page in PAGES if page.suffixes[:-1] == [".zh"]]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CHANGES = ROOT / "docs" / "changes.md"

# Folders that a page may leave out before a name.
ROOTS = (ROOT, ROOT / "dsmoe_vl", ROOT / "ds_configs", ROOT / "launch" / "recipes", ROOT / "launch" / "slurm")
SUFFIXES = (".py", ".toml", ".json", ".sh", ".md", ".html", ".css", ".sbatch")
# Not in the repository: a run leaves them, a converter writes them, or users make them.
MADE = {"plan.json", "eval.json", "index.json", "trainer.json", "data.json", "manifest.json", "report.html"}
MADE |= {"tensorboard/", "checkpoints/", "samples/", "my_recipe.toml"}

_CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PLACEHOLDER = re.compile(r"[A-Z]{3}|[*<>{}\[\]]|://|\.\.")  # runs/NAME/..., formats/*.py, a URL, another folder
_MODULE = re.compile(r"-m ([\w.]+)")
_NAME = re.compile(r"`([A-Za-z_]\w*)`")
_RECIPE_KEY = re.compile(rf"`((?:{'|'.join(field.name for field in fields(Recipe))})(?:\.\w+)+)[` ]")
_NAME_IN = re.compile(r"`([\w/]+\.py): (\w+)`")  # `parallel/process_group.py: end_rank`


def code(page: Path) -> Iterator[tuple[str, bool]]:
    """Everything that is set as code, and whether it stands within a sentence."""
    for match in _CODE.finditer(page.read_text(encoding="utf-8")):
        text = match.group()
        yield text.strip("`"), not (text.startswith("    ") or text.startswith("```"))


def files(page: Path) -> Iterator[str]:
    """The words of code that name a file or folder of the repository.

    Blocks also show commands on users' files: there a word counts if it begins with a folder of ours.
    """
    for text, in_sentence in code(page):
        for word in re.split(r"[\s\"'(),;]+", text):
            name = word.rstrip(":").partition("::")[0]
            if not name.endswith((*SUFFIXES, "/")) or _PLACEHOLDER.search(name) or name in MADE or name == "/":
                continue
            first = name.partition("/")[0]
            if in_sentence or ("/" in name and any((root / first).is_dir() for root in ROOTS[:2])):
                yield name


def rows(page: Path, title: str) -> list[list[str]]:
    """The cells of the table under a heading of a page, without its head."""
    section = page.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def changes() -> list[list[str]]:
    """The rows of all tables of the page of changes."""
    titles = re.findall(r"^## (.*)$", CHANGES.read_text(encoding="utf-8"), re.MULTILINE)
    return [row for title in titles for row in rows(CHANGES, title)]


def found(name: str) -> Path | None:
    return next((root / name for root in ROOTS if (root / name).exists()), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    assert sorted({name for name in files(page) if found(name) is None}) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_starts_exist(page):
    modules = {module for text, _ in code(page) for module in _MODULE.findall(text)}
    places = {module: ROOT / module.replace(".", "/") for module in modules}
    missing = [m for m, at in places.items() if not (at.with_suffix(".py").exists() or (at / "__main__.py").exists())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_files_exist(page):
    named = [(found(file), name) for file, name in _NAME_IN.findall(page.read_text(encoding="utf-8"))]
    assert [name for path, name in named if path is None or name not in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    broken = []
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if "://" not in link and (not path.exists() or (heading and heading not in anchors(path))):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The names by which headings of a page can be linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("row", changes(), ids=lambda row: row[0])
def test_a_change_belongs_where_the_table_says(row):
    """The file in the second column has the names in the third."""
    _, file, there = row
    path = found(file.strip("`"))
    assert path is not None, file
    text = path.read_text(encoding="utf-8")
    assert [name for name in _NAME.findall(there) if not re.search(rf"\b{name}\b", text)] == []


def test_every_line_of_a_table_of_changes_is_read():
    """A table below no heading, or a second one below a heading, would have rows that the test above does not see."""
    lines = [line for line in CHANGES.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heads = [line for line in lines if line == "| change | file | there |"]
    assert len(changes()) == len(lines) - 2 * len(heads) > 0
    assert all(len(row) == 3 for row in changes())


def test_settings_that_exist_are_keys_of_the_recipe():
    """In the table of changes, "exists" names keys of the recipe."""
    keys = _RECIPE_KEY.findall(CHANGES.read_text(encoding="utf-8"))
    assert "model.vision.norm" in keys and "run.checkpoint_every" in keys
    for key in keys:
        assert reduce(getattr, key.split("."), Recipe()) is not None, key


def test_the_table_of_folders_is_the_order_of_layers():
    """`__init__`, the top row, is no folder."""
    shown = {re.sub(r"/|\.py", "", name).strip("`"): int(layer) for layer, name, _ in rows(ARCHITECTURE, "Folders")}
    assert shown == {name: level for level, row in enumerate(ORDER[:-1], 1) for name in row}
    layers = list(shown.values())
    assert all(above >= below for above, below in pairwise(layers))


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_a_translation_shows_what_the_page_shows(page):
    """The same commands, outputs, pictures and figures of theirs, in the same order; a translation may leave some out.
    Every setting and option that the page names in sentences is named too."""
    original = page.with_name(page.name.replace(".zh", ""))

    def blocks(of):
        return [text for text, in_sentence in code(of) if not in_sentence and "runs/" in text]

    def names(of):
        return {text for text, in_sentence in code(of) if in_sentence}

    assert blocks(page) and blocks(page) == blocks(original)
    missing = names(original) - names(page)
    assert page.name == "README.zh.md" or missing == set(), missing


def test_the_test_itself(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`moe/router.py`, `data/`, `moe.json` and `plan.json`, `runs/NAME/` and `a/*.py`; `lost/none.py:`\n\n"
        "    python launch/none.py --table clips.csv -m data_tools.none\n\n[here](page.md#page) [gone](gone.md)\n"
    )
    assert list(files(page)) == ["moe/router.py", "data/", "moe.json", "lost/none.py", "launch/none.py"]
    assert found("moe/router.py") and found("data/") and found("moe.json") and not found("lost/none.py")
