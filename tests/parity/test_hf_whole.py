"""Whole vision-language models of transformers, tiny and random, in ours: equal logits with pictures in the text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.pack import PackShape, assemble, collate, grid_positions
from dsmoe_vl.data.segment import Modality, Picture, Segment
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.model.cache import KeyValueCache
from dsmoe_vl.model.init import initialise
from dsmoe_vl.pretrained.importing import import_models
from dsmoe_vl.tasks.registry import build_backbone

transformers = pytest.importorskip("transformers", reason="transformers: imported models were not compared")

SIDE, VOCABULARY, IMAGE = 4, 97, 90  # pixels of a patch; pieces; the one that stands for a cell
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "pad_token_id": None,
}  # fmt: skip
SPARSE = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "norm_topk_prob": True}
INTERN = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60,
    "patch_size": [SIDE, SIDE], "image_size": [24, 24], "attention_bias": True,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
QWEN = {
    "hidden_size": 36, "depth": 4, "num_heads": 3, "intermediate_size": 60, "patch_size": SIDE,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
MROPE = {**ROPE, "mrope_section": [4, 3, 3], "mrope_interleaved": True}
CASES = {
    "internvl": ("InternVL", INTERN, {"model_type": "qwen3", **TEXT, "rope_parameters": ROPE}),
    "internvl, experts": ("InternVL", INTERN, {"model_type": "qwen3_moe", **TEXT, **SPARSE, "rope_parameters": ROPE}),
    "qwen3_vl": ("Qwen3VL", QWEN, {**TEXT, "rope_parameters": MROPE}),
    "qwen3_vl_moe": ("Qwen3VLMoe", QWEN, {**TEXT, **SPARSE, "rope_parameters": MROPE}),
}  # fmt: skip
MERGE = 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the pictures of each text. InternVL's own program reads squares, of one size in a call.
GRIDS = {"InternVL": (((6, 6),), ((4, 4), (4, 4)), (), ((8, 8),))}
GRIDS |= dict.fromkeys(("Qwen3VL", "Qwen3VLMoe"), (((6, 6),), ((4, 10), (8, 2)), (), ((2, 2), (2, 2), (10, 4))))


def made(name, folder):
    """A random model whose norms, biases and routers are not those of a fresh one, saved."""
    kind, vision, text = CASES[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "mlp.gate.weight" in key:
                value.mul_(20)
            else:
                value.add_((0.3 if value.dim() == 1 else 0.05) * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def imported(folder, output):
    """Our model with the folder's weights; what the import did not fill is of our tasks, or starts at zero."""
    import_models(None, None, output, whole=folder)
    recipe = output.with_suffix(".toml")
    recipe.write_text(f'[model]\ninit_from = "{output}"\n')
    model = build_backbone(load_recipe(recipe)).eval()
    initialise(model, 0)
    absent, unknown = model.load_state_dict(WeightsFile(output).load(), strict=False)
    assert not unknown
    ours = ("task_bias", "modality_bias", "selection_bias")
    assert all(name.endswith(ours) or name == "head.weight" for name in absent), absent
    return model


def texts(name):
    """Texts with pictures: segments of ours, and what transformers' model takes for each of them."""
    noise = torch.Generator().manual_seed(0)
    segments, inputs = [], []
    for grids in GRIDS[CASES[name][0]]:
        parts, pictures, seen = [torch.randint(0, IMAGE, (3,), generator=noise)], [], []
        for rows, columns in grids:
            start, cells = sum(map(len, parts)), rows * columns // MERGE**2
            place = grid_positions((rows, columns), MERGE)
            pixels = torch.randint(0, 256, (rows, columns, 3, SIDE, SIDE), generator=noise, dtype=torch.uint8)
            patches = pixels[place[:, 0], place[:, 1]].flatten(1).numpy()
            pictures.append(Picture(patches, (rows, columns), -1.0, np.arange(start, start + cells, dtype=np.int32)))
            seen.append(pixels)
            parts += [torch.full((cells,), IMAGE), torch.randint(0, IMAGE, (4,), generator=noise)]
        ids = torch.cat(parts)
        tokens = ids.numpy().astype(np.int32)
        modalities = np.where(tokens == IMAGE, Modality.IMAGE, Modality.TEXT).astype(np.int32)
        segments.append(Segment(0, tokens, tokens, modalities, pictures))
        inputs.append({"input_ids": ids[None], **their_pictures(name, seen, pictures)})
        if "qwen" in name:
            inputs[-1]["mm_token_type_ids"] = (ids == IMAGE).int()[None]
    return segments, inputs


def their_pictures(name, seen, pictures):
    """pictures uint8 [rows, columns, 3, p, p] as the model's own processor makes them."""
    if not seen:
        return {}
    if "qwen" in name:  # of two frames that are the same
        patches = torch.cat([torch.from_numpy(picture.patches) for picture in pictures]).view(-1, 3, 1, SIDE, SIDE)
        grids = torch.tensor([[1, *picture.grid] for picture in pictures])
        return {"pixel_values": (patches / 127.5 - 1).expand(-1, 3, 2, SIDE, SIDE).flatten(1), "image_grid_thw": grids}
    normal = [(pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1) for pixels in seen]
    return {"pixel_values": torch.stack([n.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2) for n in normal])}


def packed(segments):
    """In one pack, with padding behind them."""
    length, patches = (sum(sizes) for sizes in zip(*((s.length, s.patch_count) for s in segments), strict=True))
    return collate([assemble(segments, PackShape(length + 5, max(patches, 4), SIDE, MERGE))])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_a_gradient_are_equal(name, tmp_path):
    theirs = made(name, tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "ours")
    segments, inputs = texts(name)
    batch = packed(segments)
    expected = torch.cat([theirs(**one).logits[0] for one in inputs])
    hidden, _ = ours(batch)
    logits = ours.head(hidden[: len(expected)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    alone = torch.cat([ours.head(ours(packed([segment]))[0][: segment.length]) for segment in segments])
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
    labels = torch.cat([one["input_ids"][0] for one in inputs])
    for found in (logits, expected):
        F.cross_entropy(found, labels).backward()
    for mine, other in gradients(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl_moe"])
@torch.no_grad()
def test_texts_go_on_behind_the_pictures(name, tmp_path):
    """With a cache, one token at a time, all prompts together: as transformers' whole forwards of each."""
    theirs = made(name, tmp_path / "theirs")
    ours = imported(tmp_path / "theirs", tmp_path / "ours")
    segments, inputs = texts(name)
    lengths = [segment.length for segment in segments]
    patches = sum(segment.patch_count for segment in segments)
    batch = collate([assemble(segments, PackShape(sum(lengths), patches, SIDE, MERGE))])
    cache = KeyValueCache(3, lengths, 4, 2, 20, ours.embedding.weight)
    ours(batch, cache)
    noise = torch.Generator().manual_seed(1)
    for step in range(4):
        tokens = torch.randint(0, IMAGE, (len(segments),), generator=noise)
        if step == 2:  # as beams do
            order = torch.tensor([1, 0, *range(2, len(segments))])
            cache.keep(order)
            inputs = [inputs[row] for row in order.tolist()]
        found = ours.head(ours.extend(tokens, torch.zeros_like(tokens), cache))
        for row, one in enumerate(inputs):
            one["input_ids"] = torch.cat((one["input_ids"], tokens[row].view(1, 1)), dim=1)
            if "qwen" in name:
                one["mm_token_type_ids"] = (one["input_ids"] == IMAGE).int()
            torch.testing.assert_close(found[row], theirs(**one).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_stacks_of_experts_are_read_both_ways(tmp_path):
    """As transformers 5 writes them, and as version 4 did: transposed. Equal sizes do not show which: refused."""
    made("qwen3_vl_moe", tmp_path)
    import_models(None, None, tmp_path / "one", whole=tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    turned = {name: value.transpose(1, 2).contiguous() for name, value in weights.items() if ".mlp.experts." in name}
    assert len(turned) == 6
    save_file(weights | turned, file, {"format": "pt"})
    import_models(None, None, tmp_path / "two", whole=tmp_path)
    one, two = (WeightsFile(tmp_path / name).load() for name in ("one", "two"))
    assert set(one) == set(two) and all(value.equal(two[name]) for name, value in one.items())
    config = json.loads((tmp_path / "config.json").read_text())
    for hidden in (48, 24):
        changed(tmp_path, {"text_config": config["text_config"] | {"moe_intermediate_size": hidden}})
        with pytest.raises(ConfigError, match=f"moe_intermediate_size = {hidden} do not show which way"):
            import_models(None, None, tmp_path / "three", whole=tmp_path)


def test_folders_of_other_versions_are_read_alike(tmp_path):
    """With the names and the keys that transformers 4 wrote."""
    renamed = {
        "internvl": {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
                     "multi_modal_projector.": "model.multi_modal_projector."},
        "qwen3_vl": {"model.visual.": "visual."},
    }  # fmt: skip
    for name, prefixes in renamed.items():
        folder = tmp_path / name
        made(name, folder)
        import_models(None, None, folder / "one", whole=folder)
        weights = load_file(folder / "model.safetensors")
        for old, new in prefixes.items():
            weights = {new + key.removeprefix(old) if key.startswith(old) else key: w for key, w in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        text = json.loads((folder / "config.json").read_text())["text_config"]
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        changed(folder, {"text_config": text | {"rope_scaling": rope}, "pad_token_id": 0})
        import_models(None, None, folder / "two", whole=folder)
        one, two = (WeightsFile(folder / number).load() for number in ("one", "two"))
        assert set(one) == set(two) and all(value.equal(two[key]) for key, value in one.items())
        assert (folder / "one" / "model.json").read_text() == (folder / "two" / "model.json").read_text()


def gradients(ours, theirs):
    """Of the embedding, the first layer of the encoder, and the connector: (ours, transformers')."""
    yield ours.embedding.weight.grad, theirs.model.language_model.embed_tokens.weight.grad
    if hasattr(theirs.model, "visual"):
        tower = theirs.model.visual
        yield ours.vision.layers[0].feed_forward.up.weight.grad, tower.blocks[0].mlp.linear_fc1.weight.grad
        yield ours.connector.down.weight.grad, tower.merger.linear_fc2.weight.grad
        yield ours.connector.taps[1].cell_norm.weight.grad, tower.deepstack_merger_list[1].norm.weight.grad
        return
    tower = theirs.model.vision_tower
    yield ours.vision.layers[0].feed_forward.up.weight.grad, tower.encoder.layer[0].mlp.fc1.weight.grad
    yield ours.connector.down.weight.grad, theirs.model.multi_modal_projector.linear_2.weight.grad


def changed(folder, change):
    """A change of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "internvl_chat"}, "model_type = 'internvl_chat' of a whole model .* nearest .*\"-HF\""),
        ({"downsample_ratio": 0.3}, "downsample_ratio = 0.3 of a connector is not read; 1/n is"),
        ({"vision_feature_layer": -2}, "vision_feature_layer = -2 of a connector is not read; -1 is"),
        ({"text_config": None}, "text_config is missing"),
        ({"model_type": "qwen2_5_vl"}, "model_type = 'qwen2_5_vl' of a whole model .* the nearest that is: qwen3_vl"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(change, message, tmp_path):
    made("internvl", tmp_path / "theirs")
    changed(tmp_path / "theirs", change)
    with pytest.raises(ConfigError, match=message):
        import_models(None, None, tmp_path / "ours", whole=tmp_path / "theirs")


def test_both_lists_are_closed(tmp_path):
    made("internvl", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    some = {name: value for name, value in weights.items() if not name.endswith("linear_2.bias")}
    for tensors, message in (
        ({**weights, "multi_modal_projector.odd": torch.ones(2)}, "no rule knows what to do with .*projector.odd"),
        (some, "has no tensor multi_modal_projector.linear_2.bias, of which connector.down.bias is made"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            import_models(None, None, tmp_path / "ours", whole=tmp_path)
    for part in ({"text": tmp_path, "vision": None}, {"text": None, "vision": tmp_path}):
        with pytest.raises(ConfigError, match=f"is a whole model, internvl: give --whole {tmp_path}"):
            import_models(**part, output=tmp_path / "ours")
    with pytest.raises(ConfigError, match="has both parts already: leave --text and --vision out"):
        import_models(tmp_path, None, tmp_path / "ours", whole=tmp_path)
