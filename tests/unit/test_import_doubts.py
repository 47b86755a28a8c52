"""Folders of other makers that lack something, or say two things: one line with the file, the tensor and the fix, and
nothing left in the output. Bad weights in one file are in tests/cli/test_import.py, tokenizers in their own file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.pretrained.importing import import_models

transformers = pytest.importorskip("transformers", reason="transformers: importing was not checked")

DECODER = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 5000.0, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "image_size": 20,
    "intermediate_size": 24,
}  # fmt: skip
HEAD, EMBEDDING, GATE = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """text: a sparse decoder, vision: an encoder with an odd grid, shards: the decoder in two files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DECODER)).save_pretrained(folder / "text")
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)).save_pretrained(folder / "vision")
    shutil.copytree(folder / "text", folder / "shards")
    weights = load_file(folder / "shards" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    names = sorted(weights)
    places = {}
    for file, part in (("a.safetensors", names[:20]), ("b.safetensors", names[20:])):
        save_file({name: weights[name] for name in part}, folder / "shards" / file)
        places |= dict.fromkeys(part, file)
    (folder / "shards" / INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture
def copy(models, tmp_path):
    """A function: a copy of one of the models whose config.json has other values and whose weights are changed."""

    def make(name, change=None, **config):
        folder = tmp_path / name
        shutil.copytree(models / name, folder)
        said = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(said))
        if change is not None:
            weights = load_file(folder / "model.safetensors")
            change(weights)
            save_file(weights, folder / "model.safetensors")
        return folder

    return make


def refused(folder, message, kind=CheckpointError, vision=False):
    """In one line that names a file of the folder; the output is as if nothing had been done."""
    output = folder.parent / "output"
    with pytest.raises(kind, match=message) as error:
        import_models(None if vision else folder, folder if vision else None, output)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not output.exists() or not list(output.iterdir())


def test_a_missing_and_a_truncated_shard(copy):
    folder = copy("shards")
    content = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(content[:-8])
    refused(folder, "b.safetensors cannot be read: .*: download it again")
    (folder / "b.safetensors").unlink()
    refused(folder, rf"b.safetensors is missing, of which {INDEX} says that it has model\.layers\.\S+ \(\d+ tensors .*")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")
    refused(folder, rf"b.safetensors lacks model\.\S+, which {INDEX} names: download it again")


def _nan(weights):
    weights["model.norm.weight"][3] = float("nan")


def _few_bits(weights):
    weights[GATE] = weights[GATE].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, "model.norm.weight has values that are not finite: download"),
        (_few_bits, f"{GATE} has the type F8_E4M3, which is not read: name a folder with weights in"),
    ],
)
def test_values_and_types_that_are_not_read(copy, change, message):
    refused(copy("text", change), f"model.safetensors: {message}")


def _fused(rows):
    """The experts of a layer as one tensor, hidden units in its rows or in its columns."""

    def change(weights):
        for layer in range(DECODER["num_hidden_layers"]):
            inner = f"model.layers.{layer}.mlp.experts."
            one = {
                name: torch.stack([weights.pop(f"{inner}{n}.{name}_proj.weight") for n in range(4)])
                for name in ("gate", "up", "down")
            }
            both = torch.cat((one["gate"], one["up"]), dim=1)
            weights[f"{inner}gate_up_proj"] = both if rows else both.transpose(1, 2).contiguous()
            weights[f"{inner}down_proj"] = one["down"] if rows else one["down"].transpose(1, 2).contiguous()

    return change


@pytest.mark.parametrize("rows", [True, False])
def test_experts_in_one_tensor(copy, rows):
    refused(copy("text", _fused(rows)), r"model.safetensors: model.layers.0.mlp.experts.down_proj \[4, .* which layout")


def _without_head(weights):
    del weights[HEAD]


def _copied_head(weights):
    weights[HEAD] = weights[EMBEDDING].clone()


def test_the_flag_of_tied_embeddings_against_the_file(copy):
    refused(copy("text", tie_word_embeddings=True), f"= true, but {HEAD} in model.safetensors is not", ConfigError)


def test_the_flag_of_an_output_projection_that_is_not_there(copy):
    refused(copy("text", _without_head, tie_word_embeddings=False), f"= false, but no file has {HEAD}", ConfigError)


def test_a_copy_of_the_embedding_is_tied_to_it(copy, tmp_path):
    done = import_models(copy("text", _copied_head, tie_word_embeddings=True), None, tmp_path / "output")
    assert done.settings["model"]["tied"] and "head.weight" not in WeightsFile(tmp_path / "output").places


def _mixed(weights):
    weights[GATE] = weights[GATE].bfloat16()


def test_a_tensor_of_two_types_has_the_wider_one(copy, tmp_path):
    import_models(copy("text", _mixed), None, tmp_path / "output")
    qkv = WeightsFile(tmp_path / "output").read("layers.0.attention.qkv.weight")
    assert qkv.dtype == torch.float32


@pytest.mark.parametrize(
    ("said", "message", "kind"),
    [
        ({"num_attention_heads": "2"}, "model.heads in .*config.json is '2'; it must be a whole number", ConfigError),
        ({"rope_parameters": [1]}, "has a value of another type than `save_pretrained` writes .Attr", ConfigError),
        ({"rope_parameters": None, "rope_theta": None}, "neither rope_parameters.rope_theta nor rope_th", ConfigError),
        ({"num_attention_heads": 3}, "qkv.weight from model.layers.0.self_attn.q.* config.json says", CheckpointError),
    ],
    ids=str,
)
def test_values_of_config_json(copy, said, message, kind):
    refused(copy("text", **said), message, kind)


@pytest.mark.parametrize(("key", "value"), [("image_mean", [0.5]), ("image_std", [0.5, 0.5, 0])])
def test_mean_and_deviation_of_pixels(copy, key, value):
    folder = copy("vision")
    (folder / "preprocessor_config.json").write_text(json.dumps({key: value}))
    refused(folder, rf"preprocessor_config.json: {key} = .* must be three numbers", ConfigError, vision=True)


def test_an_odd_grid_of_positions_is_no_fault(models, tmp_path):
    """The table is resized to the grid of a picture, which has an even number of patches a side with merge 2."""
    done = import_models(None, models / "vision", tmp_path / "output")
    assert done.settings["model"]["vision"]["position_grid"] == 5
