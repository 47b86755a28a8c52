"""What a folder of another maker says twice, and not the same; and what it does not say. Each is an error with the file
and the fix, because a guess would train on without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.pretrained.decoder import Decoder
from dsmoe_vl.pretrained.source import SourceFolder

_FUSED = ("gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3")  # of all experts of a layer


@contextmanager
def reading_config(place: str) -> Iterator[None]:
    """Values of another type than transformers writes are errors that name the file. `place`: it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, KeyError) as error:
        raise ConfigError(
            f"{place} has a value of another type than `save_pretrained` writes ({type(error).__name__}: {error}): "
            "take the model's own file"
        ) from None


def with_tie(decoder: Decoder, folder: SourceFolder) -> Decoder:
    """The decoder with an output projection of its own, or tied to the embedding, as config.json says, if it does.

    Raises ConfigError where the file and the weights do not agree: some programs follow the one, others the other.
    """
    said, head = folder.config.get("tie_word_embeddings"), decoder.head
    embedding = f"{decoder.prefix}embed_tokens.weight"
    has_head = head in folder.places
    if said is False and not has_head:
        raise ConfigError(
            f"{folder.place} says tie_word_embeddings = false, but no file has {head}: download the weights again, or "
            "set it to true if the output projection is the embedding"
        )
    if not said or not has_head or embedding not in folder.places:
        return decoder
    if folder.spec(head) != folder.spec(embedding) or not folder.read(head).equal(folder.read(embedding)):
        raise ConfigError(
            f"{folder.place} says tie_word_embeddings = true, but {head} in {folder.places[head]} is not {embedding}: "
            "set it to false if the output projection was trained on its own, or remove that tensor"
        )
    return replace(decoder, model=replace(decoder.model, tied=True))


def require_known_experts(decoder: Decoder, folder: SourceFolder) -> None:
    """Raises CheckpointError if the experts of a layer are one tensor that no rule reads: some programs have hidden
    units in its rows and others in its columns, and where the sizes are equal nothing says which."""
    known = {source for target in decoder.targets() for source in target.sources}
    for name in sorted(folder.places):
        inner, _, last = name.removesuffix(".weight").rpartition(".")
        if inner.endswith(".experts") and last in _FUSED and name not in known:
            raise CheckpointError(
                f"{folder.folder / folder.places[name]}: {name} {list(folder.spec(name).shape)} has all experts of a "
                "layer, and no file says in which layout: name a folder with a tensor for each expert, as the model's "
                "makers publish it"
            )


def require_pixels(folder: SourceFolder) -> None:
    """Raises ConfigError if preprocessor_config.json has no mean and deviation of three colours each."""
    for key in ("image_mean", "image_std"):
        found = folder.preprocessor.get(key)
        if found is None:
            continue
        are_numbers = isinstance(found, list) and len(found) == 3 and all(isinstance(x, int | float) for x in found)
        if not are_numbers or (key == "image_std" and min(found) <= 0):
            raise ConfigError(
                f"{folder.folder / 'preprocessor_config.json'}: {key} = {found!r} must be three numbers"
                f"{' above 0' * (key == 'image_std')}: take the model's own file"
            )
