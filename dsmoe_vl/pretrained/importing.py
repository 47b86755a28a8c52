"""Other makers' models as a folder from which training starts: `model.init_from = DIR`.

DIR/
  model-*.safetensors and their index    in our names; a tensor at a time, so memory is that of the largest
  model.json      the recipe's settings that follow from the weights
  tokenizer.model or tokenizer.json      of the language model, if its folder has one
  probe.safetensors   if asked for: what the makers' program answers, for the start of training
  origin.json     of each tensor: from which, and how; what was left out; what training fills with first values

Both lists are closed: a tensor of the source that no rule knows, and one of ours that should be filled and is not, are
errors that name it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.export import make_new_folder
from dsmoe_vl.checkpoint.tensor_files import Share, Spec, write_tensors
from dsmoe_vl.checkpoint.weights_file import WeightsFile, shard_name
from dsmoe_vl.config.imported import DEFAULTS, MODEL_NAME, ORIGIN_NAME
from dsmoe_vl.config.load import recipe_from_table
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.model.without_values import without_values
from dsmoe_vl.moe.expert_names import expert_name, is_of_experts
from dsmoe_vl.pretrained.decoder import Decoder, read_decoder
from dsmoe_vl.pretrained.doubts import reading_config, require_known_experts, require_pixels, with_tie
from dsmoe_vl.pretrained.mapping import Target
from dsmoe_vl.pretrained.probe import make_probe
from dsmoe_vl.pretrained.source import SourceFolder
from dsmoe_vl.pretrained.tokenizer import FoundTokenizer, find_tokenizer
from dsmoe_vl.pretrained.tower import Tower, read_tower
from dsmoe_vl.pretrained.upcycling import Upcycling, upcycled
from dsmoe_vl.pretrained.whole import Whole, is_whole, read_whole
from dsmoe_vl.tasks.registry import build_backbone

OF_TOWER = ("vision.",)
OF_DECODER = ("embedding.", "head.", "norm.", "layers.")
OF_CONNECTOR = ("connector.",)
_ONE_ROW_A_PIECE = ("embedding.weight", "head.weight")
_NEW = ("router.task_bias", "router.modality_bias")  # of ours alone: they start at zero
_ELEMENTS = 1 << 22  # that are read at once
_OF_NEW_CONNECTOR = 1.5  # root mean square of its outputs, for features of a last norm
_NO_TENSOR = ("rotary_emb.inv_freq",)  # of theirs: not trained


@dataclass(frozen=True)
class Imported:
    """What was written: parameters by part, those that training will fill with first values, and the tokenizer, if any.

    `fresh` has the sizes that the recipe's defaults give, where the weights do not say them.
    """

    settings: dict[str, Any]
    parameters: dict[str, int]
    fresh: dict[str, int]
    tokenizer: FoundTokenizer | None


def import_models(
    text: Path | None,
    vision: Path | None,
    output: Path,
    *,
    whole: Path | None = None,
    experts: Upcycling | None = None,
    controls: Mapping[str, str] | None = None,
    probe: bool = False,
) -> Imported:
    """Write the folder `output`, from a language model, a vision encoder, both, or a whole model.

    experts: what becomes of a dense language model, if it is not to stay one. controls: pieces of the tokenizer that
    stand for our symbols, by the symbols' names in the recipe. probe: ask transformers for what training compares at
    its start. Raises ConfigError, CheckpointError, OSError.
    """
    language = whole or text
    _check(text, vision, whole)
    _check_options(language, experts, controls, probe)
    recipe, targets = Recipe(), dict[str, tuple[SourceFolder, Target]]()
    settings: dict[str, Any] = {}
    left_out: dict[str, list[str]] = {}
    owned: tuple[str, ...] = ()
    tokenizer: FoundTokenizer | None = None
    found: Whole | None = None
    if language is not None:
        folder = _folder(language, whole is not None)
        with reading_config(folder.place):
            if whole is not None:
                found = read_whole(folder.config, folder.preprocessor, folder.places, folder.place)
            decoder = read_decoder(folder.config, folder.places, folder.place) if found is None else found.decoder
        if found is None:
            decoder = with_tie(decoder, folder)
        if experts is not None:
            decoder = upcycled(decoder, experts, folder.place)
        tokenizer = find_tokenizer(folder, decoder.vocab_size, controls or {}, {} if found is None else found.symbols)
        recipe, settings = _with_decoder(recipe, decoder, tokenizer)
        _check_settings(settings, folder.place)
        require_known_experts(decoder, folder)
        wanted = _grown(decoder.targets(), tokenizer)
        owned += OF_DECODER
        if found is None:
            left_out[str(language)] = _take(folder, wanted, partial(_is_no_tensor, decoder), targets)
        else:
            recipe = replace(recipe, model=replace(recipe.model, vision=found.tower.vision))
            settings["model"]["vision"] = asdict(found.tower.vision)
            left_out[str(language)] = _take(folder, chain(wanted, found.pictures()), found.leaves_out, targets)
            owned += OF_TOWER + OF_CONNECTOR
    if vision is not None:
        folder = _folder(vision, False)
        require_pixels(folder)
        with reading_config(folder.place):
            tower = read_tower(folder.config, folder.preprocessor, folder.places, folder.place)
        seen = replace(tower.vision, merge=recipe.model.vision.merge)
        recipe = replace(recipe, model=replace(recipe.model, vision=seen))
        settings.setdefault("model", {})["vision"] = _vision_settings(tower)
        _check_settings({"model": {"vision": settings["model"]["vision"]}}, folder.place)
        left_out[str(vision)] = _take(folder, tower.targets(), tower.leaves_out, targets)
        owned += OF_TOWER
    shapes = stored_shapes(recipe)
    fresh = tuple(name for name in shapes if not name.startswith(owned) or name.endswith(_NEW))
    unfilled = sorted(set(shapes) - set(fresh) - set(targets))
    if unfilled:
        raise CheckpointError(f"nothing fills {unfilled[0]} ({len(unfilled)} tensors in all): the mapping lacks it")
    make_new_folder(output)
    try:
        with writing(output):
            _write(output, targets, shapes)
            if tokenizer is not None:
                shutil.copyfile(tokenizer.tokenizer.path, output / tokenizer.settings.path)
            if language is not None and found is None:
                pictures = {"connector_scale": _strength_of_text(output)}
                settings.setdefault(DEFAULTS, {})["model"] = {"vision": pictures}
            write_json(output / MODEL_NAME, settings)
            write_json(output / ORIGIN_NAME, _origin(targets, left_out, fresh))
            if probe and language is not None:
                pieces = _pieces(recipe, tokenizer)
                make_probe(language, output, pieces if found is None else min(pieces, found.pieces), found is not None)
    except BaseException:
        for file in output.iterdir():  # else the next try would find a folder that is not empty
            file.unlink()
        raise
    return Imported(settings, _by_part(targets, shapes), _by_part(fresh, shapes), tokenizer)


def _strength_of_text(output: Path) -> float:
    """The root mean square of the embedding, over that of what a connector from nothing puts out."""
    weights = WeightsFile(output)
    count = math.prod(weights.shapes()["embedding.weight"])
    starts = range(0, count, _ELEMENTS)
    parts = (weights.flat("embedding.weight", start, min(start + _ELEMENTS, count)) for start in starts)
    mean = math.sqrt(sum(float(part.float().square().sum()) for part in parts) / count)
    return float(f"{mean / _OF_NEW_CONNECTOR:.3g}")


def _by_part(names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Numbers of parameters by the first words of their names."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + math.prod(shapes[name])
    return parts


def _check(text: Path | None, vision: Path | None, whole: Path | None) -> None:
    """Raises ConfigError unless there is something to import, and each part from one folder."""
    if text is None and vision is None and whole is None:
        raise ConfigError("nothing to import: give --text DIR, --vision DIR or both, or --whole DIR")
    if whole is not None and (text or vision):
        raise ConfigError(f"--whole {whole} has both parts already: leave --text and --vision out")


def _check_options(language: Path | None, experts: Upcycling | None, controls: Any, probe: bool) -> None:
    """Options that need something else. Raises ConfigError."""
    if language is None and experts is not None:
        raise ConfigError(f"--experts {experts.experts}: needs a language model to make them of: give --text DIR")
    if language is None and controls:
        raise ConfigError("--controls names pieces of the tokenizer of --text DIR: give it too")
    if probe and (language is None or (experts is not None and not experts.is_exact)):
        raise ConfigError("--probe: needs --text DIR, and outputs that stay the same: no --noise, no --fresh-share")


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    """Raises ConfigError for a value that a recipe may not have. `place`: where it comes from."""
    tables = {key: table for key, table in settings.items() if key != DEFAULTS}
    recipe_from_table(json.loads(json.dumps(tables)), place)


def _folder(path: Path, as_whole: bool) -> SourceFolder:
    """Raises ConfigError for a whole model in the place of a part."""
    folder = SourceFolder(path)
    if is_whole(folder.config) and not as_whole:
        raise ConfigError(f"{path} is a whole model, {folder.config['model_type']}: give --whole {path}")
    return folder


def _pieces(recipe: Recipe, found: FoundTokenizer | None) -> int:
    return recipe.tokenizer.vocab_size if found is None else min(found.old_rows, found.tokenizer.vocabulary.size)


def _is_no_tensor(decoder: Decoder, name: str) -> bool:
    return name.endswith(_NO_TENSOR) or (decoder.model.tied and name == decoder.head)  # a copy of the embedding


def _grown(targets: Iterator[Target], tokenizer: FoundTokenizer | None) -> Iterator[Target]:
    """With rows of the symbols that the folder has none for."""
    for target in targets:
        yield target if tokenizer is None or target.name not in _ONE_ROW_A_PIECE else tokenizer.grown(target)


def _with_decoder(recipe: Recipe, decoder: Decoder, found: FoundTokenizer | None) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with its settings, and those settings as tables."""
    moe = decoder.moe or replace(recipe.moe, first_dense_layers=decoder.model.layers)
    model = replace(decoder.model, vision=recipe.model.vision)
    rows = decoder.vocab_size if found is None else found.rows
    changed = replace(recipe, model=model, moe=moe, tokenizer=TokenizerConfig(vocab_size=rows))
    tokenizer: dict[str, Any] = {"vocab_size": rows} if found is None else found.table()
    tables: dict[str, Any] = {"model": _plain(decoder.model), "tokenizer": tokenizer}
    if model.rope_scaling.kind != "none":
        tables["model"]["rope_scaling"] = asdict(model.rope_scaling)
    tables["moe"] = {"first_dense_layers": moe.first_dense_layers}
    if decoder.moe is not None:
        same = ("experts", "top_k", "ffn_width", "shared_ffn_width", "shared_gate", "renormalise", "first_dense_layers")
        tables["moe"] = {name: getattr(moe, name) for name in same}
        tables[DEFAULTS] = {"moe": {name: getattr(moe, name) for name in ("routing", "balance_weight", "z_weight")}}
    return changed, tables


def _plain(settings: Any) -> dict[str, Any]:
    """Without tables inside it."""
    return {item.name: value for item in fields(settings) if not is_dataclass(value := getattr(settings, item.name))
            and item.name not in ("init_from", "embedding_from")}  # fmt: skip


def _vision_settings(tower: Tower) -> dict[str, Any]:
    """Without those of the connector, which are the recipe's."""
    ours = ("merge", "place_and_time", "placeholder")
    return {name: value for name, value in asdict(tower.vision).items() if name not in ours
            and not name.startswith("connector_")}  # fmt: skip


def _take(
    folder: SourceFolder, found: Iterator[Target], leaves_out: Any, targets: dict[str, tuple[SourceFolder, Target]]
) -> list[str]:
    """Add a folder's targets; the tensors that it leaves out. Raises CheckpointError for unknown and missing ones."""
    used: set[str] = set()
    for target in found:
        for source in target.sources:
            if source not in folder.places:
                raise CheckpointError(f"{folder.folder} has no tensor {source}, of which {target.name} is made")
        used |= set(target.sources)
        targets[target.name] = folder, target
    rest = sorted(set(folder.places) - used)
    unknown = [name for name in rest if not leaves_out(name)]
    if unknown:
        raise CheckpointError(
            f"{folder.folder}: no rule knows what to do with the tensor {unknown[0]} ({len(unknown)} in all), and to "
            "leave it out might change what the model computes"
        )
    return rest


def stored_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Of every stored tensor of the recipe's model; each expert is one."""
    with without_values():
        model = build_backbone(recipe)
    found: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        names = [expert_name(name, n) for n in range(shape[0])] if is_of_experts(name) else [name]
        found |= dict.fromkeys(names, shape[1:] if is_of_experts(name) else shape)
    return found


def _write(output: Path, targets: Mapping[str, tuple[SourceFolder, Target]], shapes: Mapping[str, Any]) -> None:
    def dtype(folder: SourceFolder, target: Target) -> torch.dtype:
        found = [folder.spec(source).dtype for source in target.sources]
        return reduce(torch.promote_types, found) if found else torch.float32

    specs = {name: Spec(dtype(*found), shapes[name]) for name, found in targets.items()}

    def made() -> Iterator[Tensor]:
        for name, (folder, target) in targets.items():
            of = f"{name} from {', '.join(target.sources)} of {folder.folder}"
            sources = [folder.read(source, keep=target.stack > 0) for source in target.sources]
            try:
                value = target.make(sources)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{of} cannot be as config.json says: {error}: take the model's own file"
                ) from None
            if tuple(value.shape) != shapes[name]:
                raise CheckpointError(
                    f"{of} would be {list(value.shape)}, but config.json says {list(shapes[name])}: take the model's "
                    "own file"
                )
            yield value
            del value, sources  # or they would be in memory while the next one is made

    file = shard_name(0, 1)
    written = write_tensors(output / file, Share(specs, made()))
    if written.broken is not None:
        raise CheckpointError(f"{written.broken} would have values that are not finite: its sources are too large")
    WeightsFile(output).write_index(dict.fromkeys(specs, file), {file: written.entry})


def _origin(
    targets: Mapping[str, tuple[SourceFolder, Target]], left_out: dict[str, list[str]], fresh: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "tensors": {
            name: {"folder": str(folder.folder), "from": list(target.sources), "how": target.how}
            for name, (folder, target) in targets.items()
        },
        "left_out": left_out,
        "first_values": list(fresh),
    }
