"""An exported model without its null experts gives what the whole model gives, to the bit."""

from __future__ import annotations

import pytest
import torch

from dsmoe_vl.checkpoint.export import LayerExport, export_run
from dsmoe_vl.checkpoint.store import checkpoint_name
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.inference.generate import generate, prompt_batch
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.model.init import initialise
from dsmoe_vl.moe.experts import Experts, RemainingExperts
from dsmoe_vl.planner.plan import plan_to_json
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.checkpoints import complete_with
from tests.unit.test_caption_task import sample

EXPERTS = 4


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def run(tiny, tmp_path, request):
    """A run of four layers, the first dense: one whole, one with null experts of every kind, one of nothing else."""
    recipe = load_recipe(tiny.recipe, ["model.layers=4"])
    plan = resolve(recipe, load_deepspeed(tiny.deepspeed()), 1, device="cpu", bf16_unit=True)
    model = build_backbone(recipe)
    initialise(model, seed=5)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # the first values give near-equal logits; these make the choices clear
        model.layers[2].feed_forward.experts.w1[0] = 0
        model.layers[2].feed_forward.experts.w2[1] = 0
        model.layers[2].feed_forward.experts.w3[3] = -0.0
        model.layers[2].feed_forward.experts.w1[2, 1:] = 0  # one hidden unit is left
        model.layers[3].feed_forward.experts.w2.zero_()
    weights = {name: value.to(request.param) for name, value in model.state_dict().items() if name != "head.weight"}
    folder = tmp_path / "run" / "checkpoints" / checkpoint_name(7)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes((tiny.data / "tokenizer.model").read_bytes())
    (tmp_path / "run" / "plan.json").write_text(plan_to_json(plan))
    sha256 = Tokenizer(folder / "tokenizer.model").sha256
    complete_with(folder, weights, sha256)
    return tmp_path / "run"


def outputs(trained):
    """Hidden states, routing statistics and captions of an image and a video."""
    task = trained.task(CaptionTask)
    prompts = [task.prompt(sample(kind, number=n)) for kind, n in [("image", 0), ("video", 1)]]
    with torch.inference_mode():
        hidden, stats = trained.model(prompt_batch(trained, prompts))
    return hidden, stats.load, generate(trained, prompts, 12)


def test_same_outputs_from_fewer_weights(run, tmp_path):
    export = export_run(run, tmp_path / "small")
    assert export.layers == (LayerExport(1, EXPERTS, 0), LayerExport(2, EXPERTS, 3), LayerExport(3, EXPERTS, 4))
    assert export.after_bytes == WeightsFile(tmp_path / "small").size_bytes
    weights = WeightsFile(tmp_path / "small").load()
    whole = WeightsFile(export.checkpoint).load()
    assert weights["layers.2.feed_forward.experts.kept"].tolist() == [2]
    assert weights["layers.2.feed_forward.experts.w2"].equal(whole["layers.2.feed_forward.experts.w2"][2:3])
    dropped = sum(whole["layers.2.feed_forward.experts." + name][0].nbytes for name in ("w1", "w2", "w3"))
    assert export.before_bytes - export.after_bytes == pytest.approx(7 * dropped, abs=7 * 3 * 100)  # the file's header

    ours, theirs = (outputs(load_run(folder)) for folder in (tmp_path / "small", run))
    assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1]) and ours[2] == theirs[2]
    load = ours[1].sum((1, 2))
    assert load[1, :2].sum() > 0 and load[2].sum() > 0  # tokens did choose null experts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: an export was not checked on CUDA")
def test_remaining_experts_on_cuda():
    whole, left = Experts(EXPERTS, 64, 32), RemainingExperts(2, 64, 32)
    kept, counts = torch.tensor([1, 3]), torch.tensor([5, 17, 0, 9])
    for name in ("w1", "w2", "w3"):
        torch.nn.init.normal_(getattr(whole, name), std=0.3).data[[0, 2]] = 0
        getattr(left, name).data.copy_(getattr(whole, name).data[kept])
    left.kept.copy_(kept)
    with torch.inference_mode():
        x, counts = torch.randn(31, 64, device="cuda", dtype=torch.bfloat16), counts.cuda()
        ours, theirs = (experts.to("cuda", torch.bfloat16).of_rows(x, counts) for experts in (left, whole))
    torch.testing.assert_close(ours, theirs)


def test_an_exported_model_can_be_exported_again(run, tmp_path):
    export_run(run, tmp_path / "small")
    again = export_run(tmp_path / "small", tmp_path / "again")
    assert [layer.dropped for layer in again.layers] == [0, 0, 0]
    assert outputs(load_run(tmp_path / "again"))[0].equal(outputs(load_run(run))[0])


def test_folders_that_cannot_be_written_or_opened(run, tmp_path):
    with pytest.raises(ConfigError, match=f"{run} is not empty"):
        export_run(run, run)
    with pytest.raises(ConfigError, match=r"plan\.json cannot be made"):
        export_run(run, run / "plan.json")
    export_run(run, tmp_path / "small")
    (tmp_path / "small" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_run(tmp_path / "small")
