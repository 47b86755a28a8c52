"""The architecture as a test: who may import whom, and how long a file may be. Read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsmoe_vl"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES_AT_MOST = 350
LAUNCH_LINES_AT_MOST = 100

# From the bottom up: a folder imports itself and what stands in a row above its own, so no two import each other.
ORDER = (
    ("console",),
    ("errors", "files"),
    ("command", "config", "metrics", "drawing"),
    ("planner", "cpu_kernels"),
    ("parallel", "data"),
    ("moe", "optim"),
    ("model",),
    ("tasks",),
    ("objective", "checkpoint", "report"),
    ("pretrained",),
    ("inference",),
    ("evaluation", "monitor"),
    ("training",),
    ("doctor",),
    ("__init__",),  # what the package offers, imported when it is asked for
)
LEVELS = {folder: level for level, row in enumerate(ORDER) for folder in row}

MAY_IMPORT_DEEPSPEED = (
    "moe/expert_parallel.py",
    "moe/expert_parallel_capacity.py",
    "moe/placement.py",
    "moe/token_exchange.py",
    "monitor/mirror.py",
    "training/compiler.py",
    "training/engine.py",
    "optim/*",
    "parallel/first_host.py",
    "parallel/process_group.py",
    "checkpoint/*",
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write dsmoe_vl.{module}"
            # `from dsmoe_vl import data` names a folder only in its list of names.
            bare = module in ("dsmoe_vl", "data_tools", "launch")
            yield from ((node.lineno, f"{module}.{alias.name}" if bare else module) for alias in node.names)


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def allowed(importer: str, module: str) -> bool:
    """Whether a file of the folder `importer` may import `module` of this package."""
    imported = module.split(".")[1]
    return imported == importer or LEVELS.get(imported, len(ORDER)) < LEVELS[importer]


def test_every_folder_has_a_level():
    assert {folder(path) for path in FILES} <= set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downwards(path):
    wrong = [
        f"{name(path)}:{line} imports {module}"
        for line, module in imports(path)
        if module.split(".")[0] == "dsmoe_vl" and not allowed(folder(path), module)
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=name)
def test_package_does_not_import_the_tools_on_top_of_it(path):
    assert not [module for _, module in imports(path) if module.split(".")[0] in ("launch", "data_tools", "tests")]


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) in ("config", "planner")], ids=name)
def test_planning_needs_no_torch(path):
    heavy = {"torch", "deepspeed", "numpy"}
    assert not [module for _, module in imports(path) if module.split(".")[0] in heavy]


def test_a_plan_imports_no_torch():
    """It takes longer than everything else of --dry-run."""
    names = "dsmoe_vl.training.start, dsmoe_vl.planner.describe, dsmoe_vl.parallel.device"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=name)
def test_deepspeed_is_imported_in_few_files(path):
    if any(module.split(".")[0] == "deepspeed" for _, module in imports(path)):
        inside = path.relative_to(PACKAGE).as_posix()
        assert any(fnmatch(inside, pattern) for pattern in MAY_IMPORT_DEEPSPEED)


def test_files_stay_short():
    folders = (PACKAGE, ROOT / "data_tools", ROOT / "launch", ROOT / "tests", ROOT / "benchmarks")
    lengths = {name(path): len(path.read_text().splitlines()) for top in folders for path in top.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LINES_AT_MOST} == {}


def test_launch_files_parse_and_wire_only():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "launch").glob("*.py")}
    assert {file: length for file, length in lengths.items() if length > LAUNCH_LINES_AT_MOST} == {}


def test_the_rule_itself():
    assert allowed("training", "dsmoe_vl.data.segment")
    assert allowed("planner", "dsmoe_vl.config.recipe") and not allowed("config", "dsmoe_vl.planner.plan")
    assert not allowed("data", "dsmoe_vl.model.vlm")
    assert not allowed("moe", "dsmoe_vl.model.vlm")
    assert not allowed("tasks", "dsmoe_vl.objective.objective")
    assert not allowed("data", "dsmoe_vl.parallel.ranks")


def test_settings_of_the_recipe_may_stand_anywhere_on_a_command_line():
    """Else argparse refuses those behind an option: "unrecognized arguments: B=2"."""
    files = [path for top in ("dsmoe_vl", "launch", "data_tools", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    found = [path for path in files if '.add_argument("overrides"' in path.read_text(encoding="utf-8")]
    assert {path.name for path in found} >= {"train.py", "plan.py", "align.py", "command_line.py"}
    assert [path for path in found if "parse_args(" in path.read_text(encoding="utf-8")] == []
