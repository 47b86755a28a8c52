"""Vision encoders of transformers, tiny and random, in ours: equal features for pictures of several grids, packed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsmoe_vl.data.pack import grid_positions
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.model.attention import SegmentLayout
from dsmoe_vl.model.vision import VisionEncoder
from dsmoe_vl.pretrained.tower import read_tower

transformers = pytest.importorskip("transformers", reason="transformers: imported encoders were not compared")

SIDE, GRID = 4, 6  # pixels of a patch; patches of a side of the table
COMMON = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": SIDE, "image_size": SIDE * GRID,
}  # fmt: skip
CASES = {
    "siglip": ("SiglipVision", {"intermediate_size": 80}),
    "siglip2": ("Siglip2Vision", {"intermediate_size": 80, "num_patches": GRID**2}),
    "clip": ("CLIPVision", {"intermediate_size": 80}),
    "dinov2": ("Dinov2", {"mlp_ratio": 2}),
    "internvit": ("InternVLVision", {"intermediate_size": 80, "attention_bias": True, "image_size": [24, 24],
                                     "patch_size": [4, 4]}),
    "internvit, no biases": ("InternVLVision", {"intermediate_size": 80, "attention_bias": False,
                                                "image_size": [24, 24], "patch_size": [4, 4]}),
}  # fmt: skip
GRIDS = ((6, 6), (4, 8), (2, 10), (8, 8))


def made(name, folder):
    """A random encoder whose norms and biases are not those of a fresh one, saved."""
    kind, settings = CASES[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**{**COMMON, **settings}, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_((0.3 if value.dim() == 1 else 0.05) * torch.randn_like(value))
    model.save_pretrained(folder)
    return model


def imported(folder, preprocessor):
    """Our encoder with the folder's weights. Every tensor is used or left out on purpose, and ours are all filled."""
    files = load_file(folder / "model.safetensors")
    tower = read_tower(json.loads((folder / "config.json").read_text()), preprocessor, files, "the folder")
    model = VisionEncoder(replace(tower.vision, merge=2)).eval()
    filled = {}
    used = set()
    for target in tower.targets():
        used |= set(target.sources)
        filled[target.name.removeprefix("vision.")] = target.make([files[source] for source in target.sources])
    assert all(tower.leaves_out(name) for name in set(files) - used), set(files) - used
    model.load_state_dict(filled)
    return model


def expected(name, model, pixels):
    """Features [rows * columns, width] of one picture, float [3, height, width]."""
    picture = pixels[None]
    rows, columns = picture.shape[2] // SIDE, picture.shape[3] // SIDE
    if name == "siglip2":
        patches = picture.view(1, 3, rows, SIDE, columns, SIDE).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        out = model(patches, torch.ones(1, rows * columns, dtype=torch.long), torch.tensor([[rows, columns]]))
        return out.last_hidden_state[0]
    if name == "clip":
        return model(picture, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2][0, 1:]
    if name == "siglip":
        return model(picture, interpolate_pos_encoding=True).last_hidden_state[0]
    return model(picture).last_hidden_state[0, 1:]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_are_equal(name, tmp_path):
    theirs = made(name, tmp_path)
    mean, std = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
    ours = imported(tmp_path, {"image_mean": mean, "image_std": std})
    noise = torch.Generator().manual_seed(0)
    patches, positions, wanted, lengths = [], [], [], [0]
    for rows, columns in GRIDS:
        pixels = torch.randint(0, 256, (3, rows * SIDE, columns * SIDE), generator=noise, dtype=torch.uint8)
        normal = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        place = torch.from_numpy(grid_positions((rows, columns), 2))
        wanted.append(expected(name, theirs, normal)[place[:, 0] * columns + place[:, 1]])
        by_patch = pixels.view(3, rows, SIDE, columns, SIDE).permute(1, 3, 0, 2, 4).flatten(2)
        patches.append(by_patch[place[:, 0], place[:, 1]])
        positions.append(place)
        lengths.append(rows * columns)
    layout = SegmentLayout(torch.from_numpy(np.cumsum(lengths, dtype=np.int32)), max(lengths))
    (found,) = ours(torch.cat(patches), torch.cat(positions), layout)
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit_mae"}, "model_type = 'vit_mae' of a vision encoder is not read"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn = true is not read"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not read"),
        ({"layer_norm_eps": None}, "layer_norm_eps is missing"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(change, message, tmp_path):
    made("dinov2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(ConfigError, match=f"^the folder: {message}"):
        read_tower(config, {}, ("embeddings.position_embeddings",), "the folder")
