"""Models of ours, random, as folders that transformers loads: no missing or unknown tensors, equal logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_vl.checkpoint.store import checkpoint_name
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.pack import PackShape, assemble, collate, grid_positions
from dsmoe_vl.data.segment import IGNORE, Modality, Picture, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.model.init import initialise
from dsmoe_vl.planner.plan import plan_to_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.pretrained.decoder import read_decoder
from dsmoe_vl.pretrained.exporting import export_hf
from dsmoe_vl.pretrained.tower import read_tower
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.checkpoints import complete_with

transformers = pytest.importorskip("transformers", reason="transformers: exported models were not compared")

TEXT = [
    "model.width=48", "model.layers=3", "model.heads=4", "model.kv_heads=2", "model.head_width=20",
    "model.ffn_width=80", "model.norm_eps=1e-5", "model.rope_base=5000.0", "moe.experts=12", "moe.top_k=3",
    "moe.ffn_width=28", 'moe.routing="plain"', "tasks.retrieval.weight=1", "tasks.summary.weight=1",
]  # fmt: skip
NO_NORM = 'model.qk_norm="none"'
DENSE = "moe.first_dense_layers=3"
# class: its settings; a selection bias in the routers
CASES = {
    "qwen3_moe": (["model.tied=false", "moe.first_dense_layers=0"], False),
    "qwen3_moe, a dense layer, gates as they are": (["moe.renormalise=false"], False),
    "qwen3_moe, one expert": (["moe.top_k=1"], False),
    "qwen3_moe, trained with capacity": (['moe.backend="capacity"', "moe.drop_tokens=false"], False),
    "qwen3": ([DENSE], False),
    "qwen2": ([DENSE, NO_NORM, "model.qkv_bias=true"], False),
    "llama": ([DENSE, NO_NORM, "model.tied=false"], False),
    "llama, a longer context": (
        [DENSE, NO_NORM, 'model.rope_scaling.kind="llama3"', "model.rope_scaling.factor=4",
         "model.rope_scaling.original_length=8"],
        False,
    ),
    "qwen3, a longer context": (
        [DENSE, "model.rope_sections=[4, 3, 3]", 'model.rope_scaling.kind="yarn"', "model.rope_scaling.factor=4",
         "model.rope_scaling.original_length=8", "model.rope_scaling.beta_fast=1.0",
         "model.rope_scaling.beta_slow=0.1"],
        False,
    ),
    "mixtral": ([NO_NORM, "moe.first_dense_layers=0"], False),
    "qwen2_moe": ([NO_NORM, "moe.shared_ffn_width=36"], False),
    "qwen2_moe, its own form": (
        [NO_NORM, "moe.shared_ffn_width=36", "moe.shared_gate=true", "model.qkv_bias=true", "moe.renormalise=false"],
        False,
    ),
    "qwen2_moe, nothing shared": ([NO_NORM, "moe.experts_per_layer=[12, 12]"], False),
    "olmoe": (['model.qk_norm="width"', "model.head_width=0", "moe.first_dense_layers=0"], False),
    "ernie4_5_moe": ([NO_NORM], True),
    "ernie4_5_moe, shared": ([NO_NORM, "moe.shared_ffn_width=56", "model.tied=false"], True),
}  # fmt: skip
SIGLIP = [
    f"model.vision.{setting}" for setting in (
        "width=36", "layers=2", "heads=3", "ffn_width=60", "patch_size=4", 'norm="layer"', "bias=true",
        "qk_norm=false", 'ffn="gelu_tanh"', 'positions="learned"', "position_grid=6", "place_and_time=false",
    )
]  # fmt: skip
LFM2 = [*SIGLIP, 'model.vision.connector_norm="joined"']
LLAVA = [*SIGLIP, "model.vision.merge=1", "model.vision.final_norm=false", 'model.vision.position_resize="bicubic"']
CLIP = [
    *LLAVA, "model.vision.prefix_tokens=1", "model.vision.pre_norm=true", 'model.vision.ffn="quick_gelu"', DENSE,
    NO_NORM,
]  # fmt: skip
WHOLE = {
    "lfm2_vl with qwen3_moe": (LFM2, "Lfm2VlForConditionalGeneration", ((6, 6), (4, 8), (8, 10))),
    "lfm2_vl with mixtral, untied": (
        [*LFM2, NO_NORM, "moe.first_dense_layers=0", "model.tied=false", 'model.vision.ffn="gelu"'],
        "Lfm2VlForConditionalGeneration", ((2, 4),),
    ),
    "llava with qwen3_moe": (LLAVA, "LlavaForConditionalGeneration", ((6, 6), (6, 6))),
    "llava with qwen2_moe, untied": (
        [*LLAVA, NO_NORM, "moe.shared_ffn_width=36", "model.tied=false"], "LlavaForConditionalGeneration", ((6, 6),),
    ),
    "llava with llama and CLIP": (CLIP, "LlavaForConditionalGeneration", ((6, 6), (6, 6))),
}  # fmt: skip


def made(tiny, folder: Path, settings, selection=False, dtype=torch.float32, change=None):
    """A run with a random model whose norms, biases and routers are not those of a fresh one; and the model."""
    recipe = load_recipe(tiny.recipe, [*TEXT, *settings])
    plan = resolve(recipe, load_deepspeed(tiny.deepspeed()), 1, device="cpu", bf16_unit=True)
    model = build_backbone(recipe).eval()
    initialise(model, seed=5)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.add_(0.3 * torch.randn(value.shape, generator=noise))
            elif name.endswith(("router.weight", "embedding.weight", "head.weight")):
                value.mul_(20)
            elif name.startswith("layers."):
                value.mul_(3)
            elif name.startswith(("vision", "connector")) or "shared" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=noise))
        for name, value in model.named_buffers():
            if selection and name.endswith("selection_bias"):
                value.add_(0.1 * torch.randn(value.shape, generator=noise))
        if change is not None:
            change(model)
    stored = model.state_dict()
    if recipe.model.tied:
        del stored["head.weight"]
    weights = {name: value.to(dtype) for name, value in stored.items()}
    at = folder / "checkpoints" / checkpoint_name(7)
    at.mkdir(parents=True)
    (at / "tokenizer.model").write_bytes((tiny.data / "tokenizer.model").read_bytes())
    (folder / "plan.json").write_text(plan_to_json(plan))
    complete_with(at, weights, Tokenizer(at / "tokenizer.model").sha256)
    return folder, model


def loaded(folder: Path, architecture: str):
    """The folder's model in transformers, with nothing missing and nothing left."""
    kind = getattr(transformers, architecture)
    model, info = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    return model.eval()


def text_logits(model, texts):
    segments = [Segment(0, text, text, 0 * text, []) for text in (text.numpy().astype("int32") for text in texts)]
    vision = model.connector.merge
    side = int((model.vision.patch_embedding.in_features // 3) ** 0.5)
    batch = collate([assemble(segments, PackShape(sum(map(len, texts)), 16, side, vision))])
    return model.head(model(batch)[0])


def some_texts():
    noise = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (length,), generator=noise) for length in (9, 17, 1, 5)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_decoder_gives_the_same_logits(name, tiny, tmp_path):
    settings, selection = CASES[name]
    run, ours = made(tiny, tmp_path / "run", settings, selection)
    kind = name.partition(",")[0]
    done = export_hf(run, tmp_path / "hf", text_only=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == kind and config["architectures"] == [done.architecture]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000 and config["dtype"] == "float32"
    assert sorted(what.partition(" (")[0] for what in done.lost) == [
        "the connector", "the head of importance", "the head of retrieval", "the vision encoder",
    ]  # fmt: skip
    theirs = loaded(tmp_path / "hf", "AutoModelForCausalLM")
    assert type(theirs).__name__ == done.architecture
    texts = some_texts()
    expected = text_logits(ours, texts)
    found = torch.cat([theirs(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1  # else the tolerance says little
    if kind != "ernie4_5_moe":  # what the importer reads from the folder is what was exported
        names = json.loads((tmp_path / "hf" / "config.json").read_text())
        back = read_decoder(names, ["lm_head.weight"] if not config["tie_word_embeddings"] else [], "the folder")
        assert back.model.width_of_head == 20 or kind == "olmoe"
        assert back.config(config["max_position_embeddings"]).items() <= config.items()


def picture(number, grid, side, merge, first):
    """A segment of one picture, the caption's symbol and a text, and the picture's pixels, uint8 [3, height, width]."""
    noise = torch.Generator().manual_seed(number)
    rows, columns = grid
    pixels = torch.randint(0, 256, (3, rows * side, columns * side), generator=noise, dtype=torch.uint8)
    by_patch = pixels.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(2)
    place = torch.from_numpy(grid_positions(grid, merge))
    cells = rows * columns // merge**2
    text = torch.randint(10, 320, (6,), generator=noise)
    tokens = torch.cat((torch.full((cells,), first), text)).int().numpy()
    modality = (torch.arange(len(tokens)) < cells).int() * int(Modality.IMAGE)
    modality[cells:] = int(Modality.TEXT)
    patches = by_patch[place[:, 0], place[:, 1]].numpy()
    seen = Picture(patches, grid, -1.0, torch.arange(cells).int().numpy())
    return Segment(task_number("caption"), tokens, 0 * tokens + IGNORE, modality.int().numpy(), [seen]), pixels


def their_pixels(kind, pixels, side):
    normal = pixels[None] / 127.5 - 1
    if kind == "llava":
        return {"pixel_values": normal}
    rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
    patches = normal.view(1, 3, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(1, rows * columns, dtype=torch.long)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[rows, columns]])}


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_a_whole_model_gives_the_same_logits(name, tiny, tmp_path):
    settings, architecture, grids = WHOLE[name]
    run, ours = made(tiny, tmp_path / "run", settings)
    done = export_hf(run, tmp_path / "hf")
    assert done.architecture == architecture
    theirs = loaded(tmp_path / "hf", "AutoModelForImageTextToText")
    assert type(theirs).__name__ == architecture
    vision, first = load_recipe(tiny.recipe, [*TEXT, *settings]).model.vision, theirs.config.image_token_id
    assert first == Tokenizer(tiny.data / "tokenizer.model").control("<image>")
    seen = [picture(n, grid, vision.patch_size, vision.merge, first) for n, grid in enumerate(grids)]
    length, patches = sum(one.length for one, _ in seen), sum(one.patch_count for one, _ in seen)
    shape = PackShape(length, patches, vision.patch_size, vision.merge)
    hidden, _ = ours(collate([assemble([one for one, _ in seen], shape)]))
    expected = ours.head(hidden).split([one.length for one, _ in seen])
    kind = name.partition(" ")[0]
    for (segment, pixels), wanted in zip(seen, expected, strict=True):
        ids = torch.from_numpy(segment.tokens).long()[None]
        found = theirs(input_ids=ids, **their_pixels(kind, pixels, vision.patch_size)).logits[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    prefix = "vision_tower.vision_model." if kind == "llava" else "model.vision_tower.vision_model."
    if "CLIP" in name:
        assert config["vision_config"]["model_type"] == "clip_vision_model"
        assert config["text_config"]["model_type"] == "llama" and config["vision_feature_layer"] == -1
        return
    back = read_tower(config["vision_config"], {}, [f"{prefix}embeddings.position_embedding.weight"], "the folder")
    ours_now = replace(vision, merge=back.vision.merge, connector_norm="none", place_and_time=True, final_norm=True)
    assert back.vision == replace(ours_now, connector_norm_eps=back.vision.connector_norm_eps)
