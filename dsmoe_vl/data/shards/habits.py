"""Known habits of other tools that make a shard or a sample unreadable, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dsmoe_vl.data.sample import EXTENSIONS, split_name

_NAMES_SHOWN = 6
_COMPRESSED = ("gz", "bz2", "xz", "zst")
_COMPRESSED_TARS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz")
_UNPACK = "unpack it, because samples can be read by position in a plain tar only"
_BEGINNINGS = {
    b"\x1f\x8b": f"compressed with gzip: {_UNPACK}",
    b"BZh": f"compressed with bzip2: {_UNPACK}",
    b"\xfd7zXZ\x00": f"compressed with xz: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"compressed with zstd: {_UNPACK}",
    b"PK\x03\x04": "a zip archive: shards are tars",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
}
NAME_RULE = "a name is KEY.EXTENSION, the key up to the first dot"


def other_format(beginning: bytes) -> str:
    """What a file that is no tar is, by its first bytes, and what to do; "" if unknown."""
    return next((what for magic, what in _BEGINNINGS.items() if beginning.startswith(magic)), "")


def tars_missing(folder: Path) -> str:
    """For a message: that a place has no tars, what is there instead, and what to do."""
    if folder.is_file():
        return f"{folder}: a file; name the folder that it is in"
    if not folder.is_dir():
        return f"{folder}: no such folder"
    paths = sorted(folder.iterdir())
    names = [path.name for path in paths]
    compressed = [name for name in names if name.lower().endswith(_COMPRESSED_TARS)]
    capitals = [name for name in names if name.lower().endswith(".tar")]
    zips = [name for name in names if name.lower().endswith(".zip")]
    inside = [path.name for path in paths if path.is_dir() and any(path.glob("*.tar"))]
    hints = {
        "unpack {} to plain tars": compressed,
        "rename {} to *.tar, in small letters": capitals,
        "unpack {} and make shards of the files with `python -m data_tools.convert folder`": zips,
        "tars are in the folders {}: name one of them, or move the tars together": inside,
    }
    found = [hint.format(named(there)) for hint, there in hints.items() if there]
    return "; ".join([f"{folder}: no *.tar in it", *found])


def habit_of(key: str, names: Iterable[str], is_scattered: bool) -> str:
    """The habits that explain why files of the sample `key` are not found, "" if there are none.

    `names`: those of its files; `is_scattered`: other files of the key are elsewhere in the tar.
    """
    habits = []
    for name in names:
        extension = split_name(name)[1]
        before, dot, last = extension.rpartition(".")
        if dot and last in EXTENSIONS:
            habits.append(f"{name} is the file {extension} of {key}: {NAME_RULE}, so put no other dot into names")
        elif before in EXTENSIONS and last in _COMPRESSED:
            habits.append(f"{name} is compressed a second time: store it as {name[: -len(last) - 1]}")
        if habits:  # the others are likely the same
            break
    if is_scattered:
        habits.append(f"{key} has files elsewhere in the tar: files of one sample must follow each other in the tar")
    return "; ".join(habits)


def named(names: Iterable[str]) -> str:
    """The first of the names, and how many there are."""
    every = list(names)
    more = f", ... ({len(every)} in all)" if len(every) > _NAMES_SHOWN else ""
    return ", ".join(every[:_NAMES_SHOWN]) + more
