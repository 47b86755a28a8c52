"""Models that no class of transformers fits, with code of their own in the folder: equal logits, and the same texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.pretrained.exporting import export_hf
from tests.parity.test_hf_export import SIGLIP, TEXT, made, picture, their_pixels

transformers = pytest.importorskip("transformers", reason="transformers: the exported code was not run")

CASES = {
    "as by default": ['moe.routing="token"', "moe.shared_ffn_width=36"],
    "by task, dense": ["moe.first_dense_layers=3", 'model.vision.connector_norm="patch"'],
    "isolated, unequal layers, untied": [
        'moe.routing="isolated"', "moe.experts_per_layer=[9, 12]", "model.tied=false", "moe.shared_ffn_width=36",
        "moe.shared_gate=true",
    ],
    "a longer context": [
        'model.rope_scaling.kind="yarn"', "model.rope_scaling.factor=4", "model.rope_scaling.original_length=8",
    ],
    "routed by task, norms over the width": ['moe.routing="task"', 'model.qk_norm="width"', "model.head_width=0"],
    "everything in the encoder": [
        *SIGLIP, "model.vision.place_and_time=true", 'model.vision.ffn="quick_gelu"', "model.vision.layer_scale=true",
        "model.vision.prefix_tokens=2", "model.vision.pre_norm=true", 'model.vision.position_resize="bicubic"',
        "model.vision.final_norm=false", 'model.vision.placeholder="replace"',
        "model.vision.connector_width=30", "model.qkv_bias=true", 'model.qk_norm="none"', "moe.top_k=1",
    ],
    "rotary and learned positions": [
        *SIGLIP, "model.vision.qk_norm=true", 'model.vision.positions="learned+rotary"', 'model.vision.ffn="swiglu"',
        'model.vision.position_resize="align_corners"', 'model.vision.connector_norm="joined"', "moe.renormalise=false",
    ],
}  # fmt: skip
CASES |= {name: [*settings, "model.vision.width=24"] for name, settings in CASES.items() if "rotary" in name}
GRIDS = ((6, 6), (4, 10), (2, 2))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Where transformers keeps the code that it has copied from folders."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def biases(model):
    noise = torch.Generator().manual_seed(7)
    for name, value in model.named_parameters():
        if name.endswith(("task_bias", "modality_bias")):
            value.data.normal_(generator=noise)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_texts_are_the_same(name, tiny, tmp_path):
    settings = ["model.vision.patch_size=4", *CASES[name]]
    run, ours = made(tiny, tmp_path / "run", settings, selection=True, change=biases)
    done = export_hf(run, tmp_path / "hf", own_code=True)
    assert done.architecture == "DsmoeVLForConditionalGeneration"
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    vision, first = load_recipe(tiny.recipe, [*TEXT, *settings]).model.vision, theirs.config.image_token_id
    assert theirs.config.task == task_number("caption")
    seen = [picture(n, grid, vision.patch_size, vision.merge, first) for n, grid in enumerate(GRIDS)]
    segments = [segment for segment, _ in seen]
    shape = PackShape(sum(s.length for s in segments), sum(s.patch_count for s in segments), 4, vision.merge)
    expected = ours.head(ours(collate([assemble(segments, shape)]))[0]).split([s.length for s in segments])
    for (segment, pixels), wanted in zip(seen, expected, strict=True):
        inputs = {"input_ids": torch.from_numpy(segment.tokens).long()[None], **their_pixels("", pixels, 4)}
        torch.testing.assert_close(theirs(**inputs).logits[0], wanted, rtol=1e-4, atol=1e-4)
    # A cache, and padding on the left, change nothing.
    found = [{"input_ids": torch.from_numpy(s.tokens).long()[None], **their_pixels("", p, 4)} for s, p in seen]
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [theirs.generate(**inputs, use_cache=False, **plain)[0, -6:] for inputs in found]
    longest, most = max(s.length for s in segments), max(s.patch_count for s in segments)
    pad = torch.nn.functional.pad
    together = {
        "input_ids": torch.cat([pad(one["input_ids"], (longest - one["input_ids"].shape[1], 0)) for one in found]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - s.length).long() for s in segments]),
        "pixel_values": torch.cat([pad(one["pixel_values"], (0, 0, 0, most - one["pixel_values"].shape[1]))
                                   for one in found]),
        "spatial_shapes": torch.cat([one["spatial_shapes"] for one in found]),
    }  # fmt: skip
    assert theirs.generate(**together, **plain)[:, -6:].equal(torch.stack(texts))


def test_the_folder_needs_no_code_of_ours(tiny, tmp_path):
    """In a process that cannot import dsmoe_vl; in bfloat16, with the routers' balancing bias as it was."""
    run, _ = made(tiny, tmp_path / "run", [], selection=True, dtype=torch.bfloat16)
    export_hf(run, tmp_path / "hf", own_code=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (
        config["auto_map"]["AutoConfig"] == "modeling_dsmoe_vl.DsmoeVLConfig"
        and "init_from" not in config["model_table"]
    )
    assert "trust_remote_code=True" in (tmp_path / "hf" / "README.md").read_text()
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"model = M.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True)\n"
        "assert model.dtype == torch.bfloat16 and 'dsmoe_vl' not in sys.modules\n"
        "out = model(torch.arange(20, 30)[None], labels=torch.arange(20, 30)[None], use_cache=True)\n"
        "assert out.loss.isfinite() and out.past_key_values.get_seq_length() == 10\n"
        "bias = model.layers[1].feed_forward.router.selection_bias; print(bias.dtype, bias.abs().max().item() > 0)\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.float32", "True"]


LACKS = {
    "residual": (['moe.backend="capacity"', "moe.residual=true"], "moe.residual = true: .* transformers: train with"),
    "places": (["model.rope_sections=[4, 3, 3]"], r"model.rope_sections = \[4, 3, 3\]: .* give --part text"),
    "taps": (["model.vision.taps=[0]"], r"model.vision.taps = \[0\]: .* give --part text"),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_the_code_lacks_is_refused(name, tiny, tmp_path):
    settings, message = LACKS[name]
    run, _ = made(tiny, tmp_path / "run", settings)
    with pytest.raises(ConfigError, match=message):
        export_hf(run, tmp_path / "hf", own_code=True)
