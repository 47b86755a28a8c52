"""What stands beside exported weights: config.json, tokenizer, chat template, settings of the pictures, README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.config.recipe import Recipe, learned_tasks
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.files import write_atomically
from dsmoe_vl.pretrained.export_classes import QWEN, ExportClass
from dsmoe_vl.pretrained.exported_tokenizer import name_of, write_tokenizer
from dsmoe_vl.pretrained.own_class import OwnClass, write_code

_LFM2_PROCESSOR = ("lfm2_vl", "dsmoe_vl")  # classes that take what LFM2-VL's processor makes
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
    form: ExportClass | OwnClass,
    recipe: Recipe,
    tokenizer: Tokenizer,
    dtype: str,
    lost: tuple[str, ...],
    output: Path,
    merged_rank: int = 0,
) -> tuple[str, ...]:
    """Write all files but the weights. Returns what else was lost, in words. `dtype`: of the weights; `merged_rank`: of
    the adapters in them, 0 without."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    config = form.config(recipe.data.pack_length, tokenizer.control("<image>")) | ids | {"dtype": dtype}
    if form.kind in QWEN:
        config["video_token_id"] = tokenizer.control("<video>")
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
    more = write_tokenizer(tokenizer, output, settings)
    if isinstance(form, OwnClass):
        write_code(output)
    if form.is_whole:
        write_atomically(output / "chat_template.jinja", _template(tokenizer))
        pictures, processor = _pictures(form, recipe)
        _write(output / "preprocessor_config.json", pictures)
        if processor:
            _write(output / "processor_config.json", processor)
    merged = f"Adapters (LoRA) of rank {merged_rank} are merged, in float32, then rounded to {dtype}."
    names = {symbol: name_of(tokenizer, tokenizer.control(symbol)) for symbol in ("<image>", "<caption>")}
    readme = _readme(form, recipe, (*lost, *more), names, merged if merged_rank else "")
    write_atomically(output / "README.md", readme)
    return more


def _template(tokenizer: Tokenizer) -> str:
    """With the names that the symbols have in this tokenizer."""
    found = "".join(name_of(tokenizer, row) for row in tokenizer.begin) + _TEMPLATE
    found = found.replace("</s>", name_of(tokenizer, tokenizer.eos))
    for symbol in CONTROL_SYMBOLS:
        found = found.replace(symbol, name_of(tokenizer, tokenizer.control(symbol)))
    return found


def _pictures(form: ExportClass | OwnClass, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json: pixels from -1 to 1, bicubic, as in training."""
    vision, data = form.recipe.model.vision, recipe.data
    pixels = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255, "resample": 3,
    }  # fmt: skip
    if isinstance(form, ExportClass) and form.kind == "llava":
        side = vision.position_grid * vision.patch_size
        size: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
        more = {
            "processor_class": "LlavaProcessor", "patch_size": vision.patch_size,
            "vision_feature_select_strategy": form.features, "image_token": "<image>",
            "num_additional_image_tokens": vision.prefix_tokens,
        }  # fmt: skip
        return pixels | size, more
    if form.kind == "internvl":
        side = vision.position_grid * vision.patch_size
        size = {"size": {"height": side, "width": side}, "crop_to_patches": False}
        return pixels | {"image_processor_type": "GotOcr2ImageProcessor"} | size, {}
    if form.kind in QWEN:
        area = vision.patch_size**2
        return pixels | {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": vision.patch_size, "temporal_patch_size": 2,
            "merge_size": vision.merge,
            "size": {"shortest_edge": vision.merge**2 * area, "longest_edge": data.image_max_patches * area},
        }, {}  # fmt: skip
    size = {
        "image_processor_type": "Lfm2VlImageProcessor", "encoder_patch_size": vision.patch_size,
        "downsample_factor": vision.merge, "do_image_splitting": False, "use_thumbnail": False, "min_image_tokens": 1,
        "max_image_tokens": data.image_max_patches // vision.merge**2,
    }  # fmt: skip
    return pixels | size, {"processor_class": "Lfm2VlProcessor"}


def _readme(
    form: ExportClass | OwnClass, recipe: Recipe, lost: tuple[str, ...], names: Mapping[str, str], merged: str
) -> str:
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
    elif form.kind in (*QWEN, "internvl"):
        lines += _bare_readme(names, form)
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
    model = recipe.model
    if form.kind == "qwen2_moe" and model.heads * model.width_of_head != model.width:
        lines += ["", "Version 4 of transformers refuses its heads, which are not width / heads wide: use version 5."]
    lines += ["", merged] if merged else []
    lines += ["", "Lost on export:" if lost else "Nothing was lost on export.", *(f"- {what}" for what in lost)]
    symbols = ", ".join(f"`{symbol}`" for symbol in CONTROL_SYMBOLS)
    tasks = ", ".join(spec.name for spec in learned_tasks(recipe))
    lines += ["", f"Control symbols: {symbols}. Learned tasks: {tasks}."]
    return "\n".join(lines) + "\n"


def _bare_readme(names: Mapping[str, str], form: ExportClass | OwnClass) -> list[str]:
    """Without the processor of the class, which writes symbols around a picture that training had not."""
    vision = form.recipe.model.vision
    is_qwen, cell = form.kind in QWEN, vision.merge**2
    cells = str(vision.position_grid**2 // cell)
    if is_qwen:
        cells = f'(int(pictures["image_grid_thw"][0].prod()) // {cell})'
    more = "mm_token_type_ids=(ids == image).int(), **pictures" if is_qwen else 'pixel_values=pictures["pixel_values"]'
    last = (
        "Version 4 of transformers finds pictures by the symbols around them, which prompts here do not have: it gives "
        "the text other positions."
        if is_qwen
        else "Every picture is resized to one square; in training it kept its aspect ratio."
    )
    return [
        "import torch", "from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer", "",
        'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")  # transformers 5',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        'pictures = AutoImageProcessor.from_pretrained("THIS_FOLDER")(images=[picture], return_tensors="pt")',
        f'image, caption = tokenizer.convert_tokens_to_ids(["{names["<image>"]}", "{names["<caption>"]}"])',
        f"ids = torch.tensor([[image] * {cells} + [caption]])",
        f"ids = model.generate(input_ids=ids, {more}, max_new_tokens=64)",
        "```", "", last,
    ]  # fmt: skip


def _write(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
