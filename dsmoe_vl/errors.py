"""The four errors that a user can cause. Each message names the value, the place and the fix."""

from __future__ import annotations

from dsmoe_vl.console import printable


class DsmoeVlError(Exception):
    """Base of every error that a user's input can cause; command lines print it without a traceback.

    Its text is printable: messages quote names and values from data.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class ConfigError(DsmoeVlError):
    """An invalid recipe, DeepSpeed JSON, override or world size."""


class DataError(DsmoeVlError):
    """Shards, media or annotations that cannot be read, or too many bad samples."""


class FetchError(DsmoeVlError):
    """Remote storage or its local cache keeps failing; the data themselves may be intact."""


class CheckpointError(DsmoeVlError):
    """A checkpoint that is missing, incomplete, or does not match the model, tokenizer or topology."""
