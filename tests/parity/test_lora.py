"""Adapters compute W x + (alpha / r) B A x; they start without an effect; merged weights compute the same."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsmoe_vl.checkpoint.export import export_run
from dsmoe_vl.checkpoint.store import checkpoint_name
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.parts import is_adapter
from dsmoe_vl.config.recipe import LoraConfig
from dsmoe_vl.data.pack import collate
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.lora import LoraExpert, LoraExperts, LoraLinear
from dsmoe_vl.moe.experts import Expert, Experts
from dsmoe_vl.moe.grouped_bank import Groups
from dsmoe_vl.planner.plan import plan_to_json, recipe_from_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.pretrained.exporting import export_hf
from dsmoe_vl.tasks.registry import build_backbone
from tests.distributed.train_losses import RECIPE
from tests.parity.test_export import outputs
from tests.support.batches import mixed_pack
from tests.support.checkpoints import complete_with

LORA = LoraConfig(rank=4, alpha=6.0)
PARTS = ("vision", "attention", "feed_forward", "experts")
W = ("w1", "w2", "w3")


def filled(module):
    torch.manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def whole(module, name, expert=None):
    """W + (alpha / r) B A, one product at a time."""
    stem = "lora" if name == "weight" else f"{name}_lora"
    tensors = (getattr(module, part) for part in (name, f"{stem}_a", f"{stem}_b"))
    weight, first, second = (value if expert is None else value[expert] for value in tensors)
    return weight + LORA.alpha / LORA.rank * sum(torch.outer(second[:, row], first[row]) for row in range(LORA.rank))


def same_with_gradients(module, x, ours, theirs):
    """Equal values and gradients, of the adapters and of x."""
    inputs = [x, *(value for name, value in module.named_parameters() if is_adapter(name))]
    direction = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found = (torch.autograd.grad((out * direction).sum(), inputs) for out in (ours, theirs))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def swiglu(module, x, expert=None):
    w1, w2, w3 = (whole(module, name, expert) for name in W)
    return (F.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()


def test_a_linear_layer_and_an_expert():
    module, x = filled(LoraLinear(nn.Linear(10, 7), LORA)), torch.randn(9, 10, requires_grad=True)
    same_with_gradients(module, x, module(x), F.linear(x, whole(module, "weight"), module.bias))
    one = filled(LoraExpert(Expert(10, 6), LORA))
    same_with_gradients(one, x, one(x), swiglu(one, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_experts_of_which_one_has_no_token(frozen):
    module, counts = filled(LoraExperts(Experts(3, 10, 6), LORA)), torch.tensor([4, 0, 5])
    x = torch.randn(9, 10, requires_grad=True)
    for name in W:
        getattr(module, name).requires_grad_(not frozen)
    theirs = torch.cat([swiglu(module, rows, number) for number, rows in enumerate(x.split(counts.tolist()))])
    same_with_gradients(module, x, module.of_rows(x, counts), theirs)


def test_a_rank_that_the_kernel_of_a_gpu_does_not_take_is_filled_up():
    """On the CPU, where the same function exists."""
    module, counts = filled(LoraExperts(Experts(3, 16, 24), LORA)).bfloat16(), torch.tensor([4, 0, 9])
    x = torch.randn(13, 16).bfloat16().requires_grad_()
    groups = Groups.of(counts, len(x))
    rows = x.new_zeros(groups.size, x.shape[1]).index_copy(0, groups.places, x)
    ours = module.linear("w1", rows, groups.ends).index_select(0, groups.places)
    theirs = module.linear("w1", x, counts.tolist())
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    adapters = (module.w1_lora_a, module.w1_lora_b)
    for one, two in zip(*(torch.autograd.grad(out.float().sum(), adapters) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)


def test_the_start_is_the_model_without_and_depends_on_seed_and_name_alone():
    settings = (LoraConfig(), replace(LORA, parts=PARTS), replace(LORA, parts=("experts",)))
    plain, adapted, fewer = (build_backbone(replace(RECIPE, lora=lora)).eval() for lora in settings)
    for model in (plain, adapted, fewer):
        initialise(model, seed=5)
    batch = collate([mixed_pack(1)])
    with torch.no_grad():
        assert adapted(batch)[0].equal(plain(batch)[0])
    own = {name: value.detach() for name, value in adapted.named_parameters()}
    assert all(own[name].equal(value) for name, value in fewer.named_parameters())
    first = own["layers.1.feed_forward.experts.w1_lora_a"]
    assert first.std() == pytest.approx(32**-0.5, rel=0.1) and not first[0].equal(first[1])
    assert not any(value.any() for name, value in own.items() if name.endswith("lora_b"))


def trained_run(tiny, folder, dtype, *overrides):
    """A run whose adapters have an effect."""
    recipe = load_recipe(tiny.recipe, ["lora.rank=4", f"lora.parts={json.dumps(PARTS)}", *overrides])
    plan = resolve(recipe, load_deepspeed(tiny.deepspeed()), 1, device="cpu", bf16_unit=True)
    model = build_backbone(recipe)
    initialise(model, seed=5)
    torch.manual_seed(0)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        for name, value in model.named_parameters():
            if name.endswith("lora_b"):
                value.normal_(0, 0.02)
    weights = {name: value.to(dtype) for name, value in model.state_dict().items() if name != "head.weight"}
    checkpoint = folder / "checkpoints" / checkpoint_name(7)
    checkpoint.mkdir(parents=True)
    (checkpoint / "tokenizer.model").write_bytes((tiny.data / "tokenizer.model").read_bytes())
    (folder / "plan.json").write_text(plan_to_json(plan))
    complete_with(checkpoint, weights, Tokenizer(checkpoint / "tokenizer.model").sha256)
    return folder


@pytest.mark.parametrize("backend", ["dropless", "capacity"])
def test_an_export_has_merged_weights_and_answers_the_same(tiny, tmp_path, backend):
    run = trained_run(tiny, tmp_path / "run", torch.float32, f'moe.backend="{backend}"')
    done = export_run(run, tmp_path / "merged")
    saved, merged = WeightsFile(done.checkpoint).load(), WeightsFile(tmp_path / "merged").load()
    assert not any(map(is_adapter, merged))
    name = "layers.1.feed_forward.experts.w2"
    delta = 4.0 * saved[f"{name}_lora_b"][1] @ saved[f"{name}_lora_a"][1]
    torch.testing.assert_close(merged[name][1], saved[name][1] + delta)
    assert recipe_from_json(tmp_path / "merged" / "plan.json").lora.rank == 0
    ours, theirs = (outputs(load_run(folder)) for folder in (tmp_path / "merged", run))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert ours[1].equal(theirs[1]) and ours[2] == theirs[2]
    export_run(tmp_path / "merged", tmp_path / "again")


def test_an_export_for_transformers_is_that_of_the_merged_model(tiny, tmp_path):
    run = trained_run(tiny, tmp_path / "run", torch.bfloat16)
    export_run(run, tmp_path / "merged")
    for source, output in ((run, "ours"), (tmp_path / "merged", "theirs")):
        export_hf(source, tmp_path / output, own_code=True)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    readme = (tmp_path / "ours" / "README.md").read_text()
    assert "Adapters (LoRA) of rank 4 are merged, in float32, then rounded to bfloat16." in readme
