"""A dense language model with experts made of its feed-forwards: the same outputs, and experts that part."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.errors import ConfigError
from dsmoe_vl.model.init import initialise
from dsmoe_vl.moe.expert_names import is_of_experts
from dsmoe_vl.pretrained.decoder import read_decoder
from dsmoe_vl.pretrained.upcycling import Upcycling, upcycled
from dsmoe_vl.tasks.registry import build_backbone
from tests.parity.test_hf_decoder import TOWER, made, packed

transformers = pytest.importorskip("transformers", reason="transformers: upcycled models were not compared")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a dense model, and that model."""
    folder = tmp_path_factory.mktemp("dense")
    return folder, made("qwen3", folder)


def decoder_of(folder, **how):
    config, files = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    return upcycled(read_decoder(config, files, "it"), Upcycling(**how), "it")


def sparse(folder, **how):
    """Our model, and the values of its tensors by their stored names."""
    files = load_file(folder / "model.safetensors")
    decoder = decoder_of(folder, **how)
    recipe = Recipe(
        model=replace(decoder.model, vision=TOWER), moe=replace(decoder.moe, routing="token"),
        tokenizer=TokenizerConfig(vocab_size=decoder.vocab_size),
    )  # fmt: skip
    model = build_backbone(recipe)
    initialise(model, 0)
    own, values = dict(model.named_parameters()), {}
    with torch.no_grad():
        for target in decoder.targets():
            values[target.name] = value = target.make([files[source] for source in target.sources])
            stacked, _, weight = target.name.rpartition(".")
            layer, _, number = stacked.rpartition(".")
            name = f"{layer}.{weight}"
            (own[name][int(number)] if is_of_experts(name) else own[target.name]).copy_(value)
    return model, values


def logits_of(model, texts, batch):
    hidden, stats = model(batch)
    return model.head(hidden[: sum(map(len, texts))]), stats


@pytest.mark.parametrize(
    "how",
    [
        {"experts": 4},
        {"experts": 6, "top_k": 3, "first_dense": 1},
        {"experts": 8, "top_k": 4, "parts": 2, "shared_width": 12},
        {"experts": 8, "top_k": 4, "parts": 4},
    ],
    ids=str,
)
def test_outputs_are_those_of_the_dense_model(dense, how):
    folder, theirs = dense
    texts, batch = packed((9, 17, 1, 5))
    logits, _ = logits_of(sparse(folder, **how)[0].eval(), texts, batch)
    expected = torch.cat([theirs(text[None]).logits[0] for text in texts])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_copies_part_in_training(dense):
    """Without noise: the router sends other tokens to each, and only then it has a gradient of its own."""
    texts, batch = packed((40, 33, 61, 29))
    model, _ = sparse(dense[0], experts=4)
    layer = model.layers[-1].feed_forward
    optimizer, labels, of_router = torch.optim.SGD(model.parameters(), 0.05), torch.cat(texts), []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(logits_of(model, texts, batch)[0], labels).backward()
        of_router.append(layer.router.weight.grad.norm().item())
        optimizer.step()
    assert of_router[0] < 1e-5 * of_router[-1]
    apart = [(layer.experts.w1[0] - layer.experts.w1[n]).abs().max() for n in (1, 2, 3)]
    assert min(apart) > 1e-6


def test_noise_and_fresh_units(dense):
    files = load_file(dense[0] / "model.safetensors")
    gate, down = (files[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "down"))
    _, noisy = sparse(dense[0], experts=4, noise=0.05)
    first = noisy["layers.1.feed_forward.experts.0.w1"]
    assert (first - gate).std() / gate.std() == pytest.approx(0.05, rel=0.1)
    assert not first.equal(noisy["layers.1.feed_forward.experts.1.w1"])
    _, fresh = sparse(dense[0], experts=4, fresh_share=0.25)
    changed = []
    for number in range(4):
        w1, w2 = (fresh[f"layers.1.feed_forward.experts.{number}.{weight}"] for weight in ("w1", "w2"))
        units = (w1 != gate).any(1).nonzero().flatten().tolist()
        assert units == (w2 != down).any(0).nonzero().flatten().tolist() and len(units) == len(gate) // 4
        changed.append(units)
    assert len({tuple(units) for units in changed}) == 4
    again = sparse(dense[0], experts=4, fresh_share=0.25)[1]
    assert all(value.equal(again[name]) for name, value in fresh.items())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"experts": 4, "top_k": 1}, "--top-k 1: with one expert a token's gate is its probability"),
        ({"experts": 2}, "--experts 2: must be more than --top-k 2"),
        ({"experts": 9, "parts": 2}, "--parts 2: does not divide --experts, 9"),
        ({"experts": 8, "top_k": 3, "parts": 2}, "--parts 2: does not divide --top-k, 3"),
        ({"experts": 9, "top_k": 3, "parts": 3}, "--parts 3: does not divide the hidden width, 80"),
        ({"experts": 4, "first_dense": 3}, "--first-dense 3: must be below 3, all of its layers"),
        ({"experts": 4, "fresh_share": 1.0}, "--fresh-share 1.0: must be from 0 to below 1"),
        ({"experts": 4, "noise": -0.1}, "--noise -0.1: must not be negative"),
    ],
)
def test_what_cannot_be_made_is_refused(dense, how, message):
    with pytest.raises(ConfigError) as error:
        decoder_of(dense[0], **how)
    assert message in str(error.value)


def test_a_model_with_experts_is_refused(tmp_path):
    made("qwen3_moe", tmp_path)
    with pytest.raises(ConfigError, match="--experts 4: it has experts already"):
        decoder_of(tmp_path, experts=4)
