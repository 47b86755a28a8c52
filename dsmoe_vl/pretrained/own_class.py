"""A model of ours as a folder with its own code, for `trust_remote_code`: every model fits, nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.config.task_table import task_number, task_rows
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_atomically
from dsmoe_vl.model.rotary import Rotary
from dsmoe_vl.planner.parameters import experts_of_layers, sparse_layers
from dsmoe_vl.pretrained import own_code
from dsmoe_vl.pretrained.importing import OF_DECODER, OF_TOWER, stored_shapes
from dsmoe_vl.pretrained.mapping import Target

_FOLDER = Path(own_code.__file__).parent
_MODELING = "modeling_dsmoe_vl"
_PACKAGE = f"from {own_code.__name__}."  # in the folder the files import each other
_MOE = ("top_k", "ffn_width", "shared_ffn_width", "shared_gate", "renormalise", "first_dense_layers", "routing")


@dataclass(frozen=True)
class OwnClass:
    """As `ExportClass`, for the class in `own_code/`: its tensors have our names. Raises ConfigError for PR-MoE,
    MRoPE and DeepStack."""

    recipe: Recipe
    kind: str = "dsmoe_vl"
    architecture: str = "DsmoeVLForConditionalGeneration"
    is_whole: bool = True
    replaces_placeholder: bool = False
    absorbed: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe.moe.residual:
            raise ConfigError("moe.residual = true: it is not in the code for transformers: train with false")
        model = self.recipe.model
        for key, value in (("rope_sections", model.rope_sections), ("vision.taps", model.vision.taps)):
            if value:
                raise ConfigError(
                    f"model.{key} = {list(value)}: it is not in the code for transformers: give --part text for the "
                    "decoder alone"
                )

    def targets(self) -> Iterator[Target]:
        """All tensors of the folder: those of the model without the heads of its tasks."""
        for name in stored_shapes(self.recipe):
            if name.startswith((*OF_DECODER, *OF_TOWER, "connector.")):
                yield Target(name, (name,))
        for layer in range(self.recipe.moe.first_dense_layers, self.recipe.model.layers):
            name = f"layers.{layer}.feed_forward.router.selection_bias"
            yield Target(name, (name,))

    def changed(self, name: str, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def config(self, positions: int, image_token: int = 0) -> dict[str, Any]:
        """As `ExportClass.config`."""
        recipe = self.recipe
        model = asdict(recipe.model)
        vision = model.pop("vision")
        del model["init_from"], model["embedding_from"], model["speech"]
        rotary = Rotary(recipe.model)
        files = {"AutoConfig": "DsmoeVLConfig"}
        files |= dict.fromkeys(("AutoModelForImageTextToText", "AutoModelForCausalLM"), self.architecture)
        return {
            "architectures": [self.architecture], "model_type": self.kind,
            "auto_map": {auto: f"{_MODELING}.{name}" for auto, name in files.items()},
            "model_table": model, "vision_table": vision,
            "moe_table": {key: getattr(recipe.moe, key) for key in _MOE},
            "experts": list(experts_of_layers(recipe)) if sparse_layers(recipe) else [],
            "vocab_size": recipe.tokenizer.vocab_size, "tasks": task_rows(False), "task": task_number("caption"),
            "rope_frequencies": rotary.frequencies(torch.device("cpu")).tolist(), "rope_magnitude": rotary.magnitude,
            "image_token_id": image_token, "max_position_embeddings": positions,
        }  # fmt: skip


def write_code(output: Path) -> None:
    """Copy the code of the class, whose files import each other there."""
    for file in sorted(_FOLDER.glob("*_dsmoe_vl.py")):
        write_atomically(output / file.name, file.read_text(encoding="utf-8").replace(_PACKAGE, "from ."))
