"""Imported whole models, back in the classes of transformers that they came from: equal tensors and logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.pretrained.export_classes import export_class
from dsmoe_vl.pretrained.exporting import export_hf, write_weights
from tests.parity import test_hf_export
from tests.parity.test_hf_whole import IMAGE, MEAN, STD, imported, made, texts

pytest.importorskip("transformers", reason="transformers: exported models were not compared")


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
@torch.no_grad()
def test_an_imported_model_leaves_as_it_came(name, tmp_path):
    """Bit for bit, but for the kernel of two frames, of which still images need the sum alone."""
    theirs = made(name, tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    recipe = load_recipe(tmp_path / "ours.toml")
    form = export_class(recipe, (), text_only=False)
    assert form.kind == name and form.architecture == type(theirs).__name__
    output = tmp_path / "back"
    output.mkdir()
    write_weights(WeightsFile(tmp_path / "ours"), recipe, form, IMAGE, output)
    (output / "config.json").write_text(json.dumps(form.config(128, IMAGE)))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", output))
    assert set(before) == set(after)
    for key, value in before.items():
        found = after[key].transpose(1, 2) if ".mlp.experts." in key else after[key]
        if key.endswith("patch_embed.proj.weight"):
            found, value = found.sum(2), value.sum(2)
        assert found.equal(value), key
    check_again(name, theirs, output)


@pytest.mark.parametrize("name", ["internvl", "internvl, experts"])
@torch.no_grad()
def test_an_imported_internvl_leaves_again(name, tmp_path):
    """With pixels from -1 to 1 in place of the maker's mean and deviation: so its patch embedding differs."""
    theirs = made(name, tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    recipe, output = load_recipe(tmp_path / "ours.toml"), tmp_path / "back"
    form = export_class(recipe, (), text_only=False)
    output.mkdir()
    write_weights(WeightsFile(tmp_path / "ours"), recipe, form, IMAGE, output)
    (output / "config.json").write_text(json.dumps(form.config(128, IMAGE)))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", output))
    assert set(before) == set(after)
    assert {key for key, value in before.items() if not after[key].equal(value)} == {
        f"vision_tower.embeddings.{part}" for part in (
            "cls_token", "position_embeddings", "patch_embeddings.projection.weight", "patch_embeddings.projection.bias"
        )
    }  # fmt: skip
    check_again(name, theirs, output)


def check_again(name, theirs, output):
    """The folder has nothing missing and nothing more, and answers as the first model."""
    again, info = type(theirs).from_pretrained(output, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    for one in texts(name)[1]:
        wanted = theirs(**one).logits
        if "internvl" in name and "pixel_values" in one:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
            one["pixel_values"] = (one["pixel_values"] * std + mean) * 2 - 1
        torch.testing.assert_close(again.eval()(**one).logits, wanted, rtol=1e-5, atol=1e-5)


FORMS = {
    "qwen3_vl": [
        'positions="learned+rotary"', 'position_resize="align_corners"', "rope_base=10000.0", "taps=[0]",
        'connector_norm="patch"', "connector_norm_eps=1e-6", "connector_width=144",
    ],
    "internvl": [
        'positions="learned"', 'position_resize="bicubic"', "layer_scale=true", "prefix_tokens=1",
        'connector_norm="joined"', 'placeholder="replace"',
    ],
}  # fmt: skip
SAME = ['norm="layer"', "bias=true", "qk_norm=false", 'ffn="gelu"', "final_norm=false", "place_and_time=false",
        "width=36", "heads=3", "layers=2", "patch_size=4", "position_grid=6"]  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_a_run_of_that_form_is_exported(kind, tiny, tmp_path):
    settings = [f"model.vision.{setting}" for setting in (*SAME, *FORMS[kind])]
    settings += ["model.rope_sections=[4, 3, 3]"] if kind == "qwen3_vl" else ["moe.first_dense_layers=3"]
    run, ours = test_hf_export.made(tiny, tmp_path / "run", settings)
    done = export_hf(run, tmp_path / "hf")
    theirs = test_hf_export.loaded(tmp_path / "hf", done.architecture)
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert '["<image>", "<caption>"]' in readme and "model.generate(input_ids=ids, " in readme
    cell, first = "(int(" if kind == "qwen3_vl" else "9", theirs.config.image_token_id
    assert f"ids = torch.tensor([[image] * {cell}" in readme
    segment, pixels = test_hf_export.picture(0, (6, 6), 4, 2, first)
    shape = PackShape(segment.length, segment.patch_count, 4, 2)
    ids, normal = torch.from_numpy(segment.tokens).long()[None], (pixels / 127.5 - 1)[None]
    inputs = {"input_ids": ids, "pixel_values": normal}
    if kind == "qwen3_vl":
        patches = torch.from_numpy(segment.pictures[0].patches).view(-1, 3, 1, 4, 4) / 127.5 - 1
        inputs["pixel_values"] = patches.expand(-1, 3, 2, 4, 4).flatten(1)
        inputs |= {"image_grid_thw": torch.tensor([[1, 6, 6]]), "mm_token_type_ids": (ids == first).int()}
    with torch.no_grad():
        expected = ours.head(ours(collate([assemble([segment], shape)]))[0])
        torch.testing.assert_close(theirs(**inputs).logits[0], expected, rtol=1e-4, atol=1e-4)
