"""What stands beside exported weights: config.json, tokenizer, chat template, settings of the pictures, README.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.data.tokenizer import CONTROL_SYMBOLS, Tokenizer
from dsmoe_vl.files import write_atomically
from dsmoe_vl.pretrained.export_classes import ExportClass
from dsmoe_vl.pretrained.own_class import OwnClass, write_code

_LFM2_PROCESSOR = ("lfm2_vl", "dsmoe_vl")  # classes that take what LFM2-VL's processor makes
_NASTY = ("", " ", "  two  spaces ", "line\nbreak\ttab", "naïve café", "日本語 🦊", "\u2581 x", "aaaaaaa bbbbbbb")
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}<caption>{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}</s>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<caption>{%- endif -%}
"""


def write_companions(
    form: ExportClass | OwnClass, recipe: Recipe, tokenizer: Tokenizer, dtype: str, lost: tuple[str, ...], output: Path
) -> tuple[str, ...]:
    """Write all files but the weights. Returns what else was lost, in words. `dtype`: of the weights."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    config = form.config(recipe.data.pack_length, tokenizer.control("<image>")) | ids | {"dtype": dtype}
    if "text_config" in config:
        config["text_config"] = config["text_config"] | ids | {"dtype": dtype}
    _write(output / "config.json", config)
    spoken = {*tokenizer.spoken, tokenizer.eos}
    silent = [row for row in range(recipe.tokenizer.vocab_size) if row not in spoken]
    _write(output / "generation_config.json", ids | {"suppress_tokens": silent})
    # With a processor of pictures "<image>" in a text is the control symbol; else it is ordinary text, as in training.
    settings: dict[str, Any] = {"model_max_length": recipe.data.pack_length, "split_special_tokens": not form.is_whole}
    if form.kind in _LFM2_PROCESSOR:  # it asks here: nothing stands around a picture
        settings["use_image_special_tokens"] = False
    more = write_tokenizer(Path(tokenizer.path), output, settings)
    if isinstance(form, OwnClass):
        write_code(output)
    if form.is_whole:
        write_atomically(output / "chat_template.jinja", _TEMPLATE)
        pictures, processor = _pictures(form, recipe)
        _write(output / "preprocessor_config.json", pictures)
        _write(output / "processor_config.json", processor)
    write_atomically(output / "README.md", _readme(form, recipe, (*lost, *more)))
    return more


def write_tokenizer(path: Path, output: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Copy the run's SentencePiece model, and write what it does as a tokenizer.json, for PreTrainedTokenizerFast.
    `settings`: keys of tokenizer_config.json. Returns what was lost, in words."""
    shutil.copyfile(path, output / path.name)
    model = SentencePieceProcessor(model_file=str(path))
    written = json.dumps(_tokenizer_json(model), ensure_ascii=False)
    differing = _first_difference(model, written)
    if differing is not None:
        return (f"tokenizer.json: it would give other ids for {differing!r}; use {path.name}",)
    write_atomically(output / "tokenizer.json", written)
    rows = {"pad": model.pad_id(), "unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    names = {f"{name}_token": model.id_to_piece(row) for name, row in rows.items()}
    _write(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names, **settings,
        },
    )  # fmt: skip
    return ()


def _tokenizer_json(model: SentencePieceProcessor) -> dict[str, Any]:
    """Of a BPE model. Its merges are all splits of a piece into two pieces, in the order of the pieces' scores."""
    pieces = [model.id_to_piece(row) for row in range(model.get_piece_size())]
    special = [row for row in range(len(pieces)) if model.IsControl(row) or model.IsUnknown(row)]
    normal = [row for row in range(len(pieces)) if row not in set(special) and not model.IsByte(row)]
    known = {pieces[row] for row in normal}
    merges = []
    for row in sorted(normal, key=model.get_score, reverse=True):
        piece = pieces[row]
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [list(split) for split in splits if known.issuperset(split)]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": row, "content": pieces[row], **added} for row in special],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.id_to_piece(model.unk_id()),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": {piece: row for row, piece in enumerate(pieces)}, "merges": merges,
        },
    }  # fmt: skip


def _first_difference(model: SentencePieceProcessor, written: str) -> str | None:
    """The first of some texts, made of the model's own pieces too, that gets other ids; None also where the library
    `tokenizers` is not installed."""
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        return None
    fast = Fast.from_str(written)
    fast.encode_special_tokens = True
    spoken = [model.id_to_piece(row) for row in range(model.get_piece_size())
              if not (model.IsControl(row) or model.IsByte(row) or model.IsUnknown(row))]  # fmt: skip
    joined = ("".join(spoken[at::97][:50]).replace("\u2581", " ") for at in range(97))
    for text in (*_NASTY, *joined):
        if fast.encode(text, add_special_tokens=False).ids != model.encode(text):
            return text[:40]
    return None


def _pictures(form: ExportClass | OwnClass, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json: pixels from -1 to 1, bicubic, as in training."""
    vision, data = form.recipe.model.vision, recipe.data
    pixels = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255, "resample": 3,
    }  # fmt: skip
    if form.kind == "llava":
        side = vision.position_grid * vision.patch_size
        size: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
        more = {
            "processor_class": "LlavaProcessor", "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "full", "image_token": "<image>", "num_additional_image_tokens": 0,
        }  # fmt: skip
        return pixels | size, more
    size = {
        "image_processor_type": "Lfm2VlImageProcessor", "encoder_patch_size": vision.patch_size,
        "downsample_factor": vision.merge, "do_image_splitting": False, "use_thumbnail": False, "min_image_tokens": 1,
        "max_image_tokens": data.image_max_patches // vision.merge**2,
    }  # fmt: skip
    return pixels | size, {"processor_class": "Lfm2VlProcessor"}


def _readme(form: ExportClass | OwnClass, recipe: Recipe, lost: tuple[str, ...]) -> str:
    lines = ["---", "library_name: transformers", "---", "", f"# {recipe.run.name}", ""]
    lines += [f"Trained with dsmoe_vl, exported as `{form.architecture}`.", "", "```python"]
    if not form.is_whole:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")', "```", "",
            "Control symbols in a text are ordinary text. Their ids: "
            "`tokenizer.convert_tokens_to_ids(\"<caption>\")` and likewise.",
        ]  # fmt: skip
    else:
        trust = ", trust_remote_code=True" if isinstance(form, OwnClass) else ""
        lines += [
            "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
            f'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER"{trust})',
            'processor = AutoProcessor.from_pretrained("THIS_FOLDER")  # needs Pillow and torchvision',
            *(["processor.use_image_special_tokens = False"] if form.kind in _LFM2_PROCESSOR else []),
            'chat = [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}]}]',
            "inputs = processor.apply_chat_template(",
            '    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"', ")",
            "ids = model.generate(**inputs, max_new_tokens=64)", "```", "",
            "The model has learned a picture, then `<caption>`, then the text: other prompts are new to it. Control "
            "symbols in a text are control symbols, so take them out of texts that are not yours.",
        ]  # fmt: skip
        if form.kind == "llava":
            lines += ["", "Every picture is resized to one square; in training it kept its aspect ratio."]
        else:
            lines += ["", "Pictures are resized by transformers' rules, which round grids differently from training."]
    lines += ["", "Lost on export:" if lost else "Nothing was lost on export.", *(f"- {what}" for what in lost)]
    symbols = ", ".join(f"`{symbol}`" for symbol in CONTROL_SYMBOLS)
    tasks = ", ".join(spec.name for spec in learned_tasks(recipe))
    lines += ["", f"Control symbols: {symbols}. Learned tasks: {tasks}."]
    return "\n".join(lines) + "\n"


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
