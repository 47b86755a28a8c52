"""A run trained for export, through the programs, into transformers: the same texts for the same pictures."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from dsmoe_vl.data.pack import grid_positions
from dsmoe_vl.inference.generate import caption_task, generate
from dsmoe_vl.inference.load import load_run
from tests.support.runs import REPOSITORY, TRAIN, finish, python, start
from tests.unit.test_caption_task import sample

transformers = pytest.importorskip("transformers", reason="transformers: exported runs were not loaded")

EXPORT = REPOSITORY / "launch" / "export.py"
FOR_LFM2 = [
    'moe.routing="plain"', "run.steps=6", "run.samples_every=0", "run.evaluate_every=0",
    *(
        f"model.vision.{setting}" for setting in (
            'norm="layer"', "bias=true", "qk_norm=false", 'ffn="gelu_tanh"', 'positions="learned"', "position_grid=6",
            "place_and_time=false", 'connector_norm="joined"',
        )
    ),
]  # fmt: skip


def exported(run, output, *options):
    return finish(start(python(EXPORT, "--run", run, "--output", output, "--format", "hf", *options)))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Trained in the form that a class of transformers has."""
    run = tmp_path_factory.mktemp("runs") / "lfm2"
    result = finish(start(python(TRAIN, *tiny.arguments(run, *FOR_LFM2))))
    assert result.status == 0, result.out + result.err
    return run


def their_inputs(prompt, side, merge):
    """The tensors that transformers' processor would make of a prompt with one picture."""
    (picture,) = prompt.pictures
    rows, columns = picture.grid
    place = grid_positions(picture.grid, merge)
    by_row = np.empty_like(picture.patches)
    by_row[place[:, 0] * columns + place[:, 1]] = picture.patches
    patches = torch.from_numpy(by_row).view(-1, 3, side, side).permute(0, 2, 3, 1).flatten(1)
    return {
        "input_ids": torch.from_numpy(prompt.tokens).long()[None],
        "attention_mask": torch.ones(1, prompt.length, dtype=torch.long),
        "pixel_values": patches[None] / 127.5 - 1, "spatial_shapes": torch.tensor([[rows, columns]]),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
    }  # fmt: skip


def test_the_captions_are_the_same(run, tmp_path):
    result = exported(run, tmp_path / "hf")
    assert result.status == 0, result.err
    assert "for transformers: Lfm2VlForConditionalGeneration" in result.out
    assert "  lost: videos: the class reads still images" in result.out and result.err.count("\n") <= 1
    assert_same_captions(run, tmp_path / "hf")


def assert_same_captions(run, folder, **options):
    kind = transformers.AutoModelForImageTextToText
    theirs, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    trained = load_run(run)
    vision = trained.recipe.model.vision
    prompts = [caption_task(trained).prompt(sample("image", number=number)) for number in range(3)]
    ours = generate(trained, prompts, 12)
    for prompt, expected in zip(prompts, ours, strict=True):
        inputs = their_inputs(prompt, vision.patch_size, vision.merge)
        found = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, prompt.length :].tolist()
        assert [token for token in found if token != trained.tokenizer.eos] == expected
    assert any(ours)


def test_a_run_by_default_leaves_with_code_of_its_own(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = exported(trained, tmp_path / "hf", "--own-code")
    assert result.status == 0, result.err
    assert "for transformers: DsmoeVLForConditionalGeneration" in result.out
    assert_same_captions(trained, tmp_path / "hf", trust_remote_code=True)


def test_what_does_not_fit_is_said_with_the_way_out(trained, tmp_path):
    result = exported(trained, tmp_path / "hf")
    assert result.status == 2 and result.err.count("\n") == 1
    assert "or give --own-code, or --part text for the decoder alone" in result.err
    result = exported(trained, tmp_path / "hf", "--part", "text")
    assert result.status == 2 and "--drop-routing-bias" in result.err and not (tmp_path / "hf").exists()
    result = exported(trained, tmp_path / "hf", "--part", "text", "--drop-routing-bias")
    assert result.status == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("  lost: ")]
    assert any("the vision encoder" in line for line in lines) and any("task_bias" in line for line in lines)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    result = exported(trained, tmp_path / "other", "--part", "text", "--own-code")
    assert result.status == 2 and "--own-code leaves nothing out" in result.err
    result = finish(start(python(EXPORT, "--run", trained, "--output", tmp_path / "other", "--part", "text")))
    assert result.status == 2 and "need --format hf" in result.err
