"""A trained model as a folder that transformers loads, with a class of its own where one fits.

DIR/
  model.safetensors    in the class's names, or several files of at most 5 GB and their index; each expert is a tensor
  config.json  generation_config.json
  tokenizer.model  tokenizer.json  tokenizer_config.json
  chat_template.jinja  preprocessor_config.json  processor_config.json    of whole models
  modeling_dsmoe_vl.py vision_dsmoe_vl.py    where no class fits, if the user wants code of ours
  README.md            how to load it, and what was lost

A tensor at a time, so memory is that of the largest; adapters are merged. Both lists are closed: a tensor of the
checkpoint that no rule knows, and one of the class that nothing fills, are errors that name it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.checkpoint.manifest import require_content
from dsmoe_vl.checkpoint.merged import merged_recipe, merged_weights
from dsmoe_vl.checkpoint.store import PLAN_NAME, require_newest, tokenizer_in
from dsmoe_vl.checkpoint.tensor_files import Share, Spec, write_tensors
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, SINGLE_NAME, WeightsFile, shard_name
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.planner.plan import recipe_from_json
from dsmoe_vl.pretrained.companions import write_companions
from dsmoe_vl.pretrained.export_classes import BIASES, ExportClass, export_class
from dsmoe_vl.pretrained.importing import stored_shapes
from dsmoe_vl.pretrained.mapping import Target
from dsmoe_vl.pretrained.own_class import OwnClass

_SHARD_BYTES = 5 * 10**9
_METADATA = {"format": "pt"}  # without it transformers refuses the file
_BIAS = "connector.down.bias"


@dataclass(frozen=True)
class Exported:
    """What was written: the checkpoint, the class, bytes of the weights, and what was left out or changed."""

    checkpoint: Path
    architecture: str
    size_bytes: int
    lost: tuple[str, ...]


@dataclass(frozen=True)
class _Outgoing:
    """A target, its tensors in the folder, and where its value comes from; None: it is filled."""

    target: Target
    spec: Spec
    stored: str | None

    def specs(self) -> dict[str, Spec]:
        """Of their tensors, by name."""
        empty = torch.empty(self.spec.shape, dtype=self.spec.dtype, device="meta")
        return {name: Spec(part.dtype, tuple(part.shape)) for name, part in self.target.parts(empty)}

    def tensors(self, made: Callable[[_Outgoing], Tensor]) -> Iterator[Tensor]:
        """Those of `specs`, from our value."""
        yield from (part for _, part in self.target.parts(made(self)))

    def value(self, weights: WeightsFile) -> Tensor:
        """Ours. A norm that the class has and never uses is filled with ones."""
        if self.stored is not None:
            return weights.read(self.stored)
        fill = 1.0 if self.target.name.endswith("norm.weight") else 0.0
        return torch.full(self.spec.shape, fill, dtype=self.spec.dtype)


@dataclass(frozen=True)
class _Stack:
    """Matrices of experts that the class has in one tensor: each transposed, [E, in, out], as transformers 4 reads
    them; version 5 turns them."""

    items: tuple[_Outgoing, ...]

    @property
    def spec(self) -> Spec:
        """Of the tensor."""
        first, experts = self.items[0].spec, self.items[0].target.stack
        return Spec(first.dtype, (experts, first.shape[1], len(self.items) // experts * first.shape[0]))

    def specs(self) -> dict[str, Spec]:
        """Of the tensor, by its name."""
        return {self.items[0].target.sources[0]: self.spec}

    def tensors(self, made: Callable[[_Outgoing], Tensor]) -> Iterator[Tensor]:
        """The tensor, from our values."""
        experts, width, rows = self.spec.shape
        yield torch.cat([made(item) for item in self.items]).view(experts, rows, width).transpose(1, 2).contiguous()


def export_hf(
    run_dir: Path, output: Path, text_only: bool = False, drop_routing_bias: bool = False, own_code: bool = False
) -> Exported:
    """Write the newest complete checkpoint of a run to the new folder `output`.

    text_only: the decoder without the vision encoder and the connector. drop_routing_bias: leave out the routers'
    biases, which changes what the model computes. own_code: with a class of ours, which fits every model, in place of
    one of transformers'. Raises ConfigError if no class fits, CheckpointError if the checkpoint cannot be read, OSError
    if a file cannot be written; then `output` is left empty.
    """
    checkpoint, manifest = require_newest(run_dir)
    recipe = recipe_from_json(run_dir / PLAN_NAME)
    if recipe.model.hears:
        raise ConfigError(
            f"{run_dir} has a speech encoder (model.speech.layers = {recipe.model.speech.layers}), which is in none of "
            "the classes for transformers: export the weights alone, without --format hf"
        )
    stored, vocabulary = WeightsFile(checkpoint), tokenizer_in(checkpoint)
    tokenizer = Tokenizer(vocabulary, recipe.tokenizer)
    require_content(checkpoint, manifest, (stored.path.name, vocabulary.name, *sorted(set(stored.places.values()))))
    weights, lora, recipe = merged_weights(checkpoint, recipe), recipe.lora, merged_recipe(recipe)
    biases = routing_biases(weights)
    form = OwnClass(recipe) if own_code else export_class(recipe, () if drop_routing_bias else biases, text_only)
    used = BIASES if recipe.moe.routing == "token" else ("selection_bias",)
    lost = _lost(recipe, weights, form, tuple(name for name in biases if name in used and drop_routing_bias))
    make_new_folder(output)
    try:
        with writing(output):
            size = write_weights(weights, recipe, form, tokenizer.control("<image>"), output)
            dtype = weights.spec("embedding.weight").dtype
            name = str(dtype).removeprefix("torch.")
            lost += write_companions(form, recipe, tokenizer, name, lost, output, lora.rank)
    except BaseException:
        for written in output.iterdir():  # else the next try would find a folder that is not empty
            written.unlink()
        raise
    return Exported(checkpoint, form.architecture, size, lost)


def routing_biases(weights: WeightsFile) -> tuple[str, ...]:
    """Those of BIASES that are not zero in some router."""
    found = [stored.rpartition(".router.")[2] for stored in weights.places if stored.endswith(BIASES)
             and weights.read(stored).any()]  # fmt: skip
    return tuple(name for name in BIASES if name in found)


def write_weights(
    weights: WeightsFile,
    recipe: Recipe,
    form: ExportClass | OwnClass,
    image_token: int,
    output: Path,
    limit: int = _SHARD_BYTES,
) -> int:
    """Write the files, of at most `limit` bytes each, and their index: bytes of all. Raises CheckpointError.

    weights: a checkpoint of the recipe's model, or a folder that `import_models` wrote.
    """
    shards: list[list[_Outgoing | _Stack]] = [[]]
    filled = 0
    for item in _stacked(_outgoing(weights, recipe, form)):
        if filled and filled + item.spec.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.spec.size
    added = {name: weights.read(source) for name, source in form.absorbed.items()}
    if form.replaces_placeholder and recipe.model.vision.placeholder == "add":
        width = form.recipe.model.width
        added[_BIAS] = weights.flat("embedding.weight", image_token * width, (image_token + 1) * width)

    def value(item: _Outgoing) -> Tensor:
        found = item.value(weights)
        if item.target.name in added:
            found = (found.double() + added[item.target.name].double()).to(found.dtype)
        return form.changed(item.target.name, found)

    def made(items: list[_Outgoing | _Stack]) -> Iterator[Tensor]:
        for item in items:
            yield from item.tensors(value)

    places: dict[str, str] = {}
    total = 0
    for number, items in enumerate(shards, 1):
        name = shard_name(number - 1, len(shards)) if len(shards) > 1 else SINGLE_NAME
        specs = {part: spec for item in items for part, spec in item.specs().items()}
        try:
            broken = write_tensors(output / name, Share(specs, made(items)), _METADATA).broken
        except SafetensorError as error:
            raise CheckpointError(f"{weights.folder} cannot be read: {error}: name another run") from None
        if broken is not None:
            raise CheckpointError(f"{weights.folder}: {broken} would have values that are not finite")
        places |= dict.fromkeys(specs, name)
        total += sum(spec.size for spec in specs.values())
    if len(shards) > 1:
        write_json(output / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def _outgoing(weights: WeightsFile, recipe: Recipe, form: ExportClass | OwnClass) -> Iterator[_Outgoing]:
    """All targets of the class. Raises CheckpointError for one that nothing fills, or that has another shape."""
    ours, theirs = stored_shapes(recipe), stored_shapes(form.recipe)
    dtype = weights.spec("embedding.weight").dtype
    for target in form.targets():
        name = target.name
        shape = theirs[name] if name in theirs else theirs[name.replace("selection_bias", "weight")][:1]
        if name in weights.places:
            spec = weights.spec(name)
            if spec.shape != shape:
                raise CheckpointError(
                    f"{weights.folder}: {name} is {list(spec.shape)}, but {PLAN_NAME} says {list(shape)}"
                )
            yield _Outgoing(target, spec, name)
            continue
        if name in ours and not _is_null_expert(name, weights):
            raise CheckpointError(f"{weights.folder} has no tensor {name}: name another run")
        yield _Outgoing(target, Spec(dtype, shape), None)


def _stacked(items: Iterable[_Outgoing]) -> Iterator[_Outgoing | _Stack]:
    """With those of one stack, which follow each other, together."""
    for key, group in groupby(items, lambda item: item.target.sources[0] if item.target.stack else item.target.name):
        found = tuple(group)
        yield _Stack(found) if found[0].target.stack else found[0]
        assert found[0].target.stack or len(found) == 1, key


def _is_null_expert(name: str, weights: WeightsFile) -> bool:
    """Whether an earlier export left it out: its layer lists the experts that are left."""
    experts, is_one, _ = name.partition(".experts.")
    return bool(is_one) and f"{experts}.experts.kept" in weights.places


def _lost(
    recipe: Recipe, weights: WeightsFile, form: ExportClass | OwnClass, dropped: tuple[str, ...]
) -> tuple[str, ...]:
    """What the folder lacks, in words. Raises CheckpointError for a tensor that no rule knows."""
    used = {target.name for target in form.targets()}
    known = stored_shapes(recipe)
    parts: dict[str, int] = {}
    for name in weights.places:
        if name in used or name.endswith((".kept", *BIASES)):
            continue
        stacked, _, weight = name.rpartition(".")
        if name not in known and f"{stacked}.0.{weight}" not in known:  # an empty one of a layer without experts
            raise CheckpointError(f"{weights.folder}: no rule knows what to do with the tensor {name}")
        if name in known:
            parts[name.partition(".")[0]] = parts.get(name.partition(".")[0], 0) + 1
    words = {"vision": "the vision encoder", "connector": "the connector"}
    lost = [f"{words.get(part, f'the head of {part}')} ({count} tensors)" for part, count in parts.items()]
    lost += [f"the routers' {name}, so tokens may go to other experts" for name in dropped]
    if form.is_whole:
        lost.append("videos: the class reads still images, without frame tokens and their times")
    return tuple(lost)
