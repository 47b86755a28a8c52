"""Export the newest weights of a run to a folder, adapters merged, without experts that output only zeros.

OUTPUT/
  model-*.safetensors and their index, as in a checkpoint; a layer that lost experts also has `experts.kept`, the
                      numbers of the others
  tokenizer.model or tokenizer.json  plan.json
  manifest.json       written last: a folder without it cannot be opened
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.manifest import entries, write_manifest
from dsmoe_vl.checkpoint.merged import merged_recipe, merged_weights
from dsmoe_vl.checkpoint.store import PLAN_NAME, require_newest, tokenizer_in
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, WeightsFile
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.files import write_atomically, writing
from dsmoe_vl.moe.experts import null_experts
from dsmoe_vl.planner.plan import plan_with, recipe_from_json


@dataclass(frozen=True)
class LayerExport:
    """Experts of a sparse layer before the export, and dropped ones. `layer`: number in the decoder, from 0."""

    layer: int
    experts: int
    dropped: int


@dataclass(frozen=True)
class Export:
    """The exported checkpoint, its sparse layers, and the size of the weights before and after."""

    checkpoint: Path
    layers: tuple[LayerExport, ...]
    before_bytes: int
    after_bytes: int


def export_run(run_dir: Path, output: Path) -> Export:
    """Write the newest complete checkpoint of a run to the new folder `output`, which `load_run` opens like a run.

    The router keeps the rows of dropped experts, so outputs do not change. Raises CheckpointError if there is no
    checkpoint, ConfigError if the run has no plan or `output` cannot be made or is not empty, OSError if a file cannot
    be written; then `output` is left empty.
    """
    checkpoint, manifest = require_newest(run_dir)
    plan_file = run_dir / PLAN_NAME
    recipe = recipe_from_json(plan_file)
    weights = merged_weights(checkpoint, recipe).load()
    make_new_folder(output)
    layers = tuple(
        _drop_null_experts(weights, name.removesuffix("w1")) for name in list(weights) if name.endswith(".experts.w1")
    )
    try:
        with writing(output):
            files = WeightsFile(output).save(weights)
            vocabulary = tokenizer_in(checkpoint)
            shutil.copyfile(vocabulary, output / vocabulary.name)
            if recipe.lora.rank:
                write_atomically(output / PLAN_NAME, plan_with(plan_file, merged_recipe(recipe)))
            else:
                shutil.copyfile(plan_file, output / PLAN_NAME)
            files |= entries(output, (INDEX_NAME, vocabulary.name, PLAN_NAME))
            write_manifest(output, replace(manifest, files=files))
    except BaseException:
        for written in output.iterdir():  # else the next try would find a folder that is not empty
            written.unlink()
        raise
    sizes = [WeightsFile(folder).size_bytes for folder in (checkpoint, output)]
    return Export(checkpoint, tuple(sorted(layers, key=lambda layer: layer.layer)), *sizes)


def make_new_folder(output: Path) -> None:
    """Raises ConfigError if it cannot be made or is not empty."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        empty = not any(output.iterdir())
    except OSError as error:
        raise ConfigError(f"output {output} cannot be made: {error.strerror}. Name a new folder.") from None
    if not empty:
        raise ConfigError(f"output {output} is not empty. Name a new folder, or remove this one.")


def _drop_null_experts(weights: dict[str, Tensor], prefix: str) -> LayerExport:
    """Remove the null experts of the layer with the tensors `prefix`w1, ... from `weights`, in place."""
    matrices = {name: weights[prefix + name] for name in ("w1", "w2", "w3")}
    null = null_experts(**matrices)
    if null.any():
        left = (~null).nonzero().squeeze(-1)
        numbers = weights.get(prefix + "kept", torch.arange(len(null)))  # an exported model may be exported again
        weights[prefix + "kept"] = numbers[left]
        weights.update({prefix + name: matrix[left] for name, matrix in matrices.items()})
    return LayerExport(int(prefix.split(".")[1]), len(null), int(null.sum()))
