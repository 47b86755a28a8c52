"""The four errors that a user can cause. Each message names the value, the place and the fix."""

from __future__ import annotations


class DsmoeVlError(Exception):
    """Base of every error that a user's input can cause; command lines print it without a traceback."""


class ConfigError(DsmoeVlError):
    """A recipe, a DeepSpeed JSON, an override or a world size that cannot be trained with."""


class DataError(DsmoeVlError):
    """Shards, media or annotations that cannot be read, or too many bad samples."""


class FetchError(DsmoeVlError):
    """Remote storage, or the cache of what comes from there, that keeps failing; the data themselves may be sound."""


class CheckpointError(DsmoeVlError):
    """A checkpoint that is missing, incomplete, or does not fit the model, tokenizer or topology."""
