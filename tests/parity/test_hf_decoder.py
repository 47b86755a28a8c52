"""Language models of transformers, tiny and random, in our decoder: equal logits, and one gradient."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsmoe_vl.config.model import MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.config.rope import RopeScalingConfig
from dsmoe_vl.data.pack import PackShape, assemble, collate
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.model.init import initialise
from dsmoe_vl.moe.expert_names import is_of_experts
from dsmoe_vl.pretrained.decoder import read_decoder
from dsmoe_vl.tasks.registry import build_backbone

transformers = pytest.importorskip("transformers", reason="transformers: imported models were not compared")

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5, "pad_token_id": None,  # a padding row gets no gradient
}  # fmt: skip
SPARSE = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 28}
CASES = {
    "qwen3": ("Qwen3", {"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3Moe", {**SPARSE, "head_dim": 20, "norm_topk_prob": True}),
    "qwen3_moe, gates as they are": ("Qwen3Moe", {**SPARSE, "head_dim": 20, "norm_topk_prob": False}),
    "qwen3_moe, a dense layer": (
        "Qwen3Moe",
        {**SPARSE, "head_dim": 20, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", {**SPARSE, "shared_expert_intermediate_size": 36, "norm_topk_prob": False}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": ("Olmoe", {"num_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": False}),
}
# Of texts longer than the original context.
LONG = {"original_max_position_embeddings": 8, "rope_theta": 50.0, "factor": 4.0}
SCALINGS = {
    "linear": ("Qwen3", {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
    "llama3": ("Qwen3", {"rope_type": "llama3", **LONG, "low_freq_factor": 0.3, "high_freq_factor": 1.2}),
    "yarn": ("Qwen3", {"rope_type": "yarn", **LONG, "beta_fast": 1.0, "beta_slow": 0.1}),
    "yarn, a factor of its own": ("Qwen3Moe", {"rope_type": "yarn", **LONG, "attention_factor": 1.3,
                                               "beta_fast": 1.1, "beta_slow": 0.2, "truncate": False}),
    "yarn, as DeepSeek": ("Qwen3", {"rope_type": "yarn", **LONG, "mscale": 1.0, "mscale_all_dim": 0.5}),
}  # fmt: skip
MORE = {"Qwen3": {"head_dim": 20}, "Qwen3Moe": {**SPARSE, "head_dim": 20, "norm_topk_prob": True}}
CASES |= {name: (kind, {**MORE[kind], "rope_parameters": table}) for name, (kind, table) in SCALINGS.items()}
TOWER = VisionConfig(patch_size=2, merge=2, width=8, layers=1, heads=2, ffn_width=12)


def made(name, folder):
    """A random model whose norms and biases are not those of a fresh one, saved."""
    kind, settings = CASES[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1:
                value.add_(0.3 * torch.randn_like(value))
            elif "router" in key or key.endswith("gate.weight"):
                value.mul_(20)
    model.save_pretrained(folder)
    return model


def imported(folder):
    """Our model with the folder's weights; every tensor of the folder is used, and every one of the decoder filled."""
    files = load_file(folder / "model.safetensors")
    found = read_decoder(json.loads((folder / "config.json").read_text()), files, f"{folder}/config.json")
    recipe = Recipe(
        model=replace(found.model, vision=TOWER),
        moe=found.moe or MoEConfig(experts=1, top_k=1, first_dense_layers=found.model.layers),
        tokenizer=TokenizerConfig(vocab_size=found.vocab_size),
    )
    model = build_backbone(recipe).eval()
    initialise(model, 0)
    own = dict(model.named_parameters())
    used, filled = set(), set()
    with torch.no_grad():
        for target in found.targets():
            used |= set(target.sources)
            value = target.make([files[source] for source in target.sources])
            stacked, _, weight = target.name.rpartition(".")
            layer, _, number = stacked.rpartition(".")
            name = f"{layer}.{weight}"
            place = own[name][int(number)] if is_of_experts(name) else own[target.name]
            filled.add(name if is_of_experts(name) else target.name)
            place.copy_(value)
    assert used == set(files)
    ours = ("vision.", "connector.", "retrieval.", "importance.")
    left = {name for name in own if name not in filled and not name.startswith(ours)}
    assert all(name.endswith(("task_bias", "modality_bias")) for name in left), left
    return model


def packed(lengths):
    noise = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, VOCABULARY, (length,), generator=noise) for length in lengths]
    segments = [
        Segment(0, text.numpy().astype("int32"), text.numpy().astype("int32"), (0 * text).numpy().astype("int32"), [])
        for text in texts
    ]
    return texts, collate([assemble(segments, PackShape(sum(lengths) + 3, 16, 2, 2))])


@pytest.mark.parametrize("name", CASES)
def test_logits_and_a_gradient_are_equal(name, tmp_path):
    theirs = made(name, tmp_path)
    ours = imported(tmp_path)
    texts, batch = packed((9, 17, 1, 5))
    hidden, _ = ours(batch)
    logits = ours.head(hidden[: sum(map(len, texts))])
    expected = torch.cat([theirs(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    if name in SCALINGS:
        ours.rotary.scaling, ours.rotary.magnitude = RopeScalingConfig(), 1.0  # the test can tell
        assert (ours.head(ours(batch)[0][: len(logits)]) - expected).abs().max() > 0.01
    labels = torch.cat(texts)
    for found in (logits, expected):
        F.cross_entropy(found, labels).backward()
    for mine, other in ((ours.norm, theirs.model.norm), (ours.embedding, theirs.model.embed_tokens)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "gemma"}, "model_type = 'gemma' is not read, but .* the nearest that is: llama"),
        (
            "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 5e3},
            "rope_parameters.rope_theta = 10000.0 and rope_theta = 5000.0 contradict each other",
        ),
        ("llama", {"rope_parameters": None, "rope_theta": None}, "neither rope_parameters.rope_theta nor rope_theta"),
        (
            "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "rope scaling of type 'dynamic' is not read, but .* the nearest that is: yarn",
        ),
        (
            "llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "rope scaling of type 'longrope' is not read, but .* the nearest that is: yarn",
        ),
        (
            "llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "original_max_position_embeddings of the rope scaling 'yarn' is missing",
        ),
        (
            "llama", {"rope_parameters": {"mrope_section": [2, 2, 2], "rope_theta": 1e4}},
            r"mrope_section = \[2, 2, 2\] without mrope_interleaved is not read",
        ),
        ("llama", {"attention_bias": True}, "attention_bias = True is not read"),
        ("mistral", {"sliding_window": 8}, "sliding_window = 8 is not read"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"layers \[1\] are dense; only the first ones may be"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not read"),
    ],
)  # fmt: skip
def test_what_would_be_computed_otherwise_is_refused(name, change, message, tmp_path):
    made(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(ConfigError, match=f"^the folder: {message}"):
        read_decoder(config, (), "the folder")
