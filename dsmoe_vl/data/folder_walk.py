"""All files of a folder and its subfolders, also through links."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = 3
TWICE = "a link to a folder that is read already"

Passed = tuple[Path, str]  # a folder or file that is passed over, and why


def files_below(root: Path) -> tuple[list[Path], list[Passed]]:
    """The files in `root` and its subfolders, sorted by path, and what was passed over.

    Links to folders are followed, in the order of their names, but no folder is entered twice, and none around `root`.
    Hidden files and folders are passed over.
    """
    home = os.path.realpath(root)
    files: list[Path] = []
    passed: list[Passed] = []
    links: list[Path] = []
    entered: set[str] = set()
    _walk(root, files, passed, links, entered)
    while links:
        links.sort()
        path = links.pop(0)
        if os.path.commonpath([home, target := os.path.realpath(path)]) == target:
            passed.append((path, "a link to a folder around it"))
        else:
            _walk(path, files, passed, links, entered)
    return sorted(files), sorted(passed)


def described(passed: Sequence[Passed], root: Path) -> str:
    """`2 hidden (.git, a/.cache), 1 a second link to a folder (b)`: counts by reason, with the first EXAMPLES."""
    names: dict[str, list[str]] = {}
    for path, reason in passed:
        names.setdefault(reason, []).append(os.path.relpath(path, root))
    return ", ".join(
        f"{len(found)} {reason} ({', '.join(found[:EXAMPLES])}{', ...' if len(found) > EXAMPLES else ''})"
        for reason, found in sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    )


def _walk(top: Path, files: list[Path], passed: list[Passed], links: list[Path], entered: set[str]) -> None:
    """Add what is in `top` without following links, and the true paths of its folders, which are not entered twice."""
    folders = [top]
    for folder in folders:
        true_path = os.path.realpath(folder)
        if true_path in entered:
            passed.append((folder, TWICE))
            continue
        entered.add(true_path)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            passed.append((folder, f"a folder that cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                passed.append((path, "hidden"))
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_dir():
                links.append(path)
            elif entry.is_file():
                files.append(path)
            else:
                passed.append((path, "a link to nothing" if entry.is_symlink() else "not a plain file"))
