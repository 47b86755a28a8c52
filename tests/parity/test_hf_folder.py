"""What stands in an exported folder: tensors bit for bit, null experts, files, the tokenizer; and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dsmoe_vl.checkpoint.export import export_run
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.control_symbols import CONTROL_SYMBOLS
from dsmoe_vl.config.model import MoEConfig
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.planner.plan import recipe_from_json
from dsmoe_vl.pretrained.decoder import read_decoder
from dsmoe_vl.pretrained.export_classes import export_class
from dsmoe_vl.pretrained.exporting import export_hf, write_weights
from dsmoe_vl.pretrained.importing import import_models
from dsmoe_vl.pretrained.tower import clip_tower, read_tower, siglip_tower
from tests.parity import test_hf_decoder, test_hf_tower
from tests.parity.test_hf_export import CLIP, LFM2, LLAVA, NO_NORM, loaded, made, some_texts, text_logits

transformers = pytest.importorskip("transformers", reason="transformers: exported folders were not loaded")


@pytest.mark.parametrize("name", ["qwen3_moe, a dense layer", "qwen2_moe", "mixtral", "olmoe", "qwen2", "llama"])
def test_imported_weights_leave_bit_for_bit(name, tmp_path):
    test_hf_decoder.made(name, tmp_path / "theirs")
    import_models(tmp_path / "theirs", None, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    found = read_decoder(config, before, "the folder")
    moe = found.moe or MoEConfig(first_dense_layers=found.model.layers)
    recipe = Recipe(found.model, moe, tokenizer=TokenizerConfig(vocab_size=found.vocab_size))
    form = export_class(recipe, (), text_only=True)
    assert form.kind == name.partition(",")[0]
    (tmp_path / "back").mkdir()
    write_weights(WeightsFile(tmp_path / "ours"), recipe, form, 0, tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert set(after) == set(before)
    assert all(after[key].dtype == value.dtype and after[key].equal(value) for key, value in before.items())
    ours = form.config(config["max_position_embeddings"])
    same = set(config) & set(ours) - {"rope_parameters", "head_dim"}
    assert {key: ours[key] for key in same} == {key: config[key] for key in same}


@pytest.mark.parametrize("name", ["siglip", "siglip2", "clip"])
def test_an_imported_vision_encoder_leaves_bit_for_bit(name, tmp_path):
    """Where pixels are from -1 to 1, as ours. Of CLIP's class token and its position there is one tensor."""
    test_hf_tower.made(name, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    pixels = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
    tower = read_tower(json.loads((tmp_path / "config.json").read_text()), pixels, files, "the folder")
    back = (
        clip_tower(tower.vision, tower.prefix)
        if name == "clip"
        else siglip_tower(tower.vision, name == "siglip2", tower.prefix)
    )
    after = {}
    for target, again in zip(tower.targets(), back.targets(), strict=name != "clip"):  # it has a norm more
        after |= dict(again.parts(target.make([files[source] for source in target.sources])))
    assert {key for key in files if not tower.leaves_out(key)} <= set(after)
    if name == "clip":
        recipe, ours = Recipe(), {"merge": 1, "connector_norm": "none", "place_and_time": False}
        recipe = replace(recipe, model=replace(recipe.model, vision=replace(tower.vision, **ours)))
        form = export_class(recipe, (), text_only=False)
        assert form.kind == "llava" and form.tower is not None and form.tower.is_clip
        token, table = (f"{tower.prefix}embeddings.{part}" for part in ("class_embedding", "position_embedding.weight"))
        assert (after[token] + after[table][0]).equal(files[token] + files[table][0])
        assert after.pop(table)[1:].equal(files[table][1:]) and after.pop(token).shape == files[token].shape
    assert all(value.equal(files[key]) for key, value in after.items())


def _without_some(model):
    model.layers[1].feed_forward.experts.w2.data[[0, 7]] = 0
    model.layers[2].feed_forward.experts.w1.data.zero_()


@torch.no_grad()
def test_experts_that_were_left_out_are_zeros_again(tiny, tmp_path):
    run, ours = made(tiny, tmp_path / "run", [], change=_without_some)
    export_run(run, tmp_path / "small")
    done = export_hf(tmp_path / "small", tmp_path / "hf", text_only=True)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    gone = [n for n in range(12) if not stored[f"model.layers.1.mlp.experts.{n}.gate_proj.weight"].any()]
    assert gone == [0, 7] and done.size_bytes == sum(value.nbytes for value in stored.values())
    theirs = loaded(tmp_path / "hf", done.architecture)
    texts = some_texts()
    found = torch.cat([theirs(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(found, text_logits(ours, texts), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_files_with_an_index_in_bfloat16(tiny, tmp_path):
    run, _ = made(tiny, tmp_path / "run", LFM2, dtype=torch.bfloat16)
    export_hf(run, tmp_path / "hf")
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    source = WeightsFile(next(run.glob("checkpoints/*/")))
    cell = source.read("connector.down.bias").double() + source.read("embedding.weight")[config["image_token_id"]]
    assert whole["model.multi_modal_projector.linear_2.bias"].equal(cell.to(torch.bfloat16))

    recipe = recipe_from_json(run / "plan.json")
    form = export_class(recipe, (), text_only=False)
    (tmp_path / "hf" / "model.safetensors").unlink()
    write_weights(source, recipe, form, config["image_token_id"], tmp_path / "hf", limit=60_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    parts = {}
    for file in files:
        with safe_open(tmp_path / "hf" / file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == file for key in names)
            parts |= {key: opened.get_tensor(key) for key in names}
    assert set(parts) == set(whole) and all(parts[key].equal(value) for key, value in whole.items())
    loaded(tmp_path / "hf", "Lfm2VlForConditionalGeneration")


TEXTS = ("a red cube left of a blue ball", " two  spaces", "<image> and </s> are words", "日本語 🦊\n\ttab", "", "▁ x")


def test_the_tokenizer_gives_the_same_ids(tiny, tmp_path):
    run, _ = made(tiny, tmp_path / "run", LFM2)
    ours = Tokenizer(tiny.data / "tokenizer.model")
    export_hf(run, tmp_path / "text", text_only=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), text
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (ours.pad, ours.bos, ours.eos)
    assert theirs.convert_tokens_to_ids(list(CONTROL_SYMBOLS)) == [ours.control(symbol) for symbol in CONTROL_SYMBOLS]
    assert (tmp_path / "text" / "tokenizer.model").read_bytes() == (tiny.data / "tokenizer.model").read_bytes()

    export_hf(run, tmp_path / "whole")  # there processors write the symbols into the text
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<image><caption>"
    assert theirs(prompt)["input_ids"] == [ours.control("<image>"), ours.control("<caption>")]
    told = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a dog"}]
    ids = theirs.apply_chat_template(told, return_dict=True)["input_ids"]
    assert ids == [ours.control("<image>"), ours.control("<caption>"), *ours.encode("a dog"), ours.eos]


@pytest.mark.parametrize("settings", [LLAVA, CLIP, LFM2], ids=["llava", "clip", "lfm2_vl"])
def test_the_processor_makes_what_the_model_was_trained_on(settings, tiny, tmp_path):
    if settings is LFM2:
        pytest.importorskip("torchvision", reason="torchvision: LFM2-VL's processor was not tried")
    run, _ = made(tiny, tmp_path / "run", settings)
    export_hf(run, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)}]}]
    made_of = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(chat, **made_of)
    ours = Tokenizer(tiny.data / "tokenizer.model")
    cells = 9 if settings is LFM2 else 36
    assert found["input_ids"].tolist() == [[ours.control("<image>")] * cells + [ours.control("<caption>")]]
    expected = pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    if settings is LFM2:
        expected = expected.reshape(3, 6, 4, 6, 4).transpose(1, 3, 2, 4, 0).reshape(36, 48)
        assert found["spatial_shapes"].tolist() == [[6, 6]]
    np.testing.assert_allclose(found["pixel_values"][0].numpy(), expected, atol=1e-6)


def _biases(model):
    for name, value in model.named_parameters():
        if name.endswith(("task_bias", "modality_bias")):
            value.data[0, 0] = 1.0


TOKEN, SHARED = 'moe.routing="token"', "moe.shared_ffn_width=28"
REFUSED = {
    "task biases": ([TOKEN], "task_bias and modality_bias are not zero, .* --drop-routing-bias"),
    "routing by task": (['moe.routing="task"'], 'moe.routing = "task": no class routes .*: train'),
    "a selection bias beside QK-norm": ([], 'ernie4_5_moe, .* has no model.qk_norm = "head": train with'),
    "and a gate": (
        [NO_NORM, SHARED, "moe.shared_gate=true", "moe.renormalise=false", "moe.shared_ffn_width=30"],
        "has no moe.shared_gate = true or gates that do not sum to 1 or moe.shared_ffn_width = 30: train",
    ),
    "a shared expert beside QK-norm": ([SHARED], 'no class with model.qk_norm = "head" has moe.shared_ffn_width = 28'),
    "QK-norm of the width": (
        ['model.qk_norm="width"'], "has moe.first_dense_layers = 1 or model.head_width = 20: train with 0, or with",
    ),
    "biases beside QK-norm": (["model.qkv_bias=true"], 'has model.qk_norm = "head" with model.qkv_bias = true and'),
    "and no experts": (
        ["model.qkv_bias=true", "moe.first_dense_layers=3"], 'no class has model.qk_norm = "head" with model.qkv_bias',
    ),
    "unequal layers": (["moe.experts_per_layer=[4, 12]"], r"moe.experts_per_layer = \[4, 12\]: every class"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_decoder_without_a_class_is_refused(case, tiny, tmp_path):
    settings, message = REFUSED[case]
    run, _ = made(tiny, tmp_path / "run", settings, "selection" in case or "gate" in case, change=_biases)
    with pytest.raises(ConfigError, match=message) as caught:
        export_hf(run, tmp_path / "hf", text_only=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [],
            'the nearest, lfm2_vl, needs in [model.vision]: norm = "layer", bias = true, qk_norm = false, '
            'ffn = "gelu", positions = "learned", place_and_time = false, connector_norm = "joined". Train with them',
        ),
        (LFM2[:-1], 'the nearest, lfm2_vl, needs in [model.vision]: connector_norm = "joined". Train with'),
        (
            [*CLIP, "model.vision.merge=2"],
            "the nearest, llava with CLIP's encoder, needs in [model.vision]: merge = 1.",
        ),
        ([*LFM2, "model.vision.taps=[0]"], "needs in [model.vision]: taps = []. Train with them"),
        ([*LFM2, "model.rope_sections=[4, 3, 3]"], "model.rope_sections = [4, 3, 3]: lfm2_vl has none"),
        ([*LFM2, "model.vision.connector_norm_eps=1e-6"], "needs in [model.vision]: connector_norm_eps = 1e-05. Train"),
    ],
)
def test_a_whole_model_without_a_class_is_refused(settings, message, tiny, tmp_path):
    run, _ = made(tiny, tmp_path / "run", settings)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        export_hf(run, tmp_path / "hf")
    assert "--part text for the decoder alone" in str(caught.value)


@torch.no_grad()
def test_biases_may_be_dropped_and_are_said_to_be(tiny, tmp_path):
    run, ours = made(tiny, tmp_path / "run", [TOKEN], selection=True, change=_biases)
    done = export_hf(run, tmp_path / "hf", text_only=True, drop_routing_bias=True)
    lost = [what for what in done.lost if what.startswith("the routers'")]
    assert [what.split()[2] for what in lost] == ["task_bias,", "modality_bias,", "selection_bias,"]
    assert all(f"- {what}\n" in (tmp_path / "hf" / "README.md").read_text() for what in done.lost)
    for name, value in [*ours.named_parameters(), *ours.named_buffers()]:
        if name.endswith(("task_bias", "modality_bias", "selection_bias")):
            value.zero_()
    text = some_texts()[0]
    found = loaded(tmp_path / "hf", done.architecture)(text[None]).logits[0]
    torch.testing.assert_close(found, text_logits(ours, [text]), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_does_not_fit_is_named(tiny, tmp_path):
    run, _ = made(tiny, tmp_path / "run", [])
    plan = (run / "plan.json").read_text()
    (run / "plan.json").write_text(plan.replace('"ffn_width": 28', '"ffn_width": 30'))
    with pytest.raises(CheckpointError, match=r"experts.0.w1 is \[28, 48\], but plan.json says \[30, 48\]"):
        export_hf(run, tmp_path / "hf", text_only=True)
    assert not list((tmp_path / "hf").iterdir())
    (run / "plan.json").write_text(plan.replace('"layers": 3', '"layers": 4'))
    with pytest.raises(CheckpointError, match=r"has no tensor layers\.3\.attention_norm\.weight: name another run"):
        export_hf(run, tmp_path / "hf", text_only=True)
    (run / "plan.json").write_text(plan.replace('"layers": 3', '"layers": 2'))
    with pytest.raises(CheckpointError, match=r"no rule knows what to do with the tensor layers\.2"):
        export_hf(run, tmp_path / "hf", text_only=True)
    (run / "plan.json").write_text(plan)
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(ConfigError, match=f"{run} is not empty"):
        export_hf(run, run, text_only=True)
    with next(run.glob("checkpoints/*/model-*")).open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        export_hf(run, tmp_path / "hf", text_only=True)
