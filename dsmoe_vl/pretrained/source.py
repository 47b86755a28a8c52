"""A folder with a model of another maker: config.json, safetensors files and what is beside them. Nothing is run.

Reading is lazy: a tensor is in memory while it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dsmoe_vl.checkpoint.tensor_files import Spec, TensorFiles, is_finite
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, SINGLE_NAME
from dsmoe_vl.errors import CheckpointError, ConfigError

_EMPTY: dict[str, Any] = {}


class SourceFolder:
    """Raises ConfigError for a folder that is none, CheckpointError for weights that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._files = folder, TensorFiles(folder)
        self._last: tuple[str, Tensor] | None = None
        self.config = self.json("config.json", needed=True)
        self.preprocessor = self.json("preprocessor_config.json", needed=False)

    @property
    def place(self) -> str:
        """config.json, for messages."""
        return str(self.folder / "config.json")

    @cached_property
    def places(self) -> dict[str, str]:
        """The file of each tensor."""
        if (self.folder / INDEX_NAME).is_file():
            found = self.json(INDEX_NAME, needed=True).get("weight_map")
            if not isinstance(found, dict) or not all(Path(str(file)).name == file for file in found.values()):
                raise CheckpointError(
                    f"{self.folder / INDEX_NAME} is not an index of weights: download the folder again"
                )
            for file in sorted(set(found.values())):
                self._require(file, {name for name, where in found.items() if where == file})
            return dict(found)
        if not (self.folder / SINGLE_NAME).is_file():
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: name a folder with weights in safetensors "
                "files (pickled ones are not read)"
            )
        return dict.fromkeys(self._keys(SINGLE_NAME), SINGLE_NAME)

    def spec(self, name: str) -> Spec:
        """Type and shape of a tensor, without reading it. Raises CheckpointError for a type of few bits."""
        try:
            return self._files.spec(self.places[name], name)
        except KeyError as error:
            raise CheckpointError(
                f"{self.folder / self.places[name]}: {name} has the type {error.args[0]}, which is not read: name a "
                "folder with weights in bf16, fp16 or fp32"
            ) from None

    def read(self, name: str, keep: bool = False) -> Tensor:
        """A tensor. Raises CheckpointError if a value of it is not finite. `keep`: until another one is read, for
        several targets in a row."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = None
        file = self.places[name]
        try:
            spec = self.spec(name)
            # Into memory of its own: pages of a mapped file would stay resident, up to those of the whole model.
            tensor = self._files.flat(file, name, 0, math.prod(spec.shape)).view(spec.shape)
        except (SafetensorError, OSError, EOFError) as error:
            raise self._damaged(file, error) from None
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self.folder / self.places[name]}: {name} has values that are not finite: download it again"
            )
        self._last = (name, tensor) if keep else None
        return tensor

    def _require(self, file: str, names: Collection[str]) -> None:
        if not (self.folder / file).is_file():
            raise CheckpointError(
                f"{self.folder / file} is missing, of which {INDEX_NAME} says that it has {min(names)} ({len(names)} "
                "tensors in all): download it"
            )
        absent = sorted(set(names) - self._keys(file))
        if absent:
            raise CheckpointError(
                f"{self.folder / file} lacks {absent[0]}, which {INDEX_NAME} names: download it again"
            )

    def _keys(self, file: str) -> frozenset[str]:
        try:
            return self._files.keys(file)
        except (SafetensorError, OSError) as error:
            raise self._damaged(file, error) from None

    def _damaged(self, file: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.folder / file} cannot be read: {error}: download it again")

    def json(self, name: str, needed: bool) -> dict[str, Any]:
        """The object in a file; an empty one if it may be missing and is. Raises ConfigError."""
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not needed:
                return _EMPTY
            raise ConfigError(f"{self.folder} has no {name}: name a folder as `save_pretrained` writes it") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is not a JSON object: name a folder as `save_pretrained` writes it")
        return found
