"""Importing folders of other makers, and starting to train from them."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_tools.synthetic.scenes import scene
from dsmoe_vl.checkpoint.store import newest_complete
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.inference.generate import prompt_batch
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.tasks.caption import CaptionTask
from tests.support.imports import DECODER, IMPORT, import_speaking, imported, with_its_tokenizer
from tests.support.runs import REPOSITORY, TRAIN, finish, python, start, two_ranks
from tests.support.tokenizers import byte_level

transformers = pytest.importorskip("transformers", reason="transformers: importing was not checked")

TOWER = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8, "image_size": 32,
    "intermediate_size": 80,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model with experts, and a vision encoder, both random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DECODER)).save_pretrained(folder / "text")
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)).save_pretrained(folder / "vision")
    return folder


@pytest.fixture(scope="module")
def both(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("imported") / "both"
    result = imported(folders, output, "text", "vision")
    assert result.status == 0, result.err
    assert "parameters imported" in result.out and re.search(r"connector +[\d,]+ parameters get first", result.out)
    assert not re.search(r"vision +[\d,]+ parameters get first values", result.out)
    assert f"warning: {folders / 'text'} has neither tokenizer.model nor tokenizer.json" in result.out
    return output


def without_shapes(tiny, output):
    """The tiny recipe, its model from the import."""
    recipe = tiny.recipe.read_text()
    first = recipe.index("[[data.sources]]")
    return f'[model]\ninit_from = "{output}"\n\n{recipe[first:]}'


@pytest.mark.parametrize(
    ("stage", "launch"), [(3, two_ranks), (2, lambda arguments: finish(start(python(TRAIN, *arguments))))]
)
def test_training_starts_from_the_imported_weights(tiny, both, tmp_path, stage, launch):
    """With a learning rate of nothing, they are in the first checkpoint, whatever the topology."""
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(without_shapes(tiny, both))
    config = json.loads(tiny.deepspeed(stage).read_text())
    config["optimizer"]["params"] |= {"lr": 1e-12, "weight_decay": 0.0}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    arguments = ["--deepspeed", tmp_path / "ds.json", "--recipe", recipe, "--run-dir", run, "run.steps=1"]
    result = launch([*map(str, arguments), "run.samples_every=0", "run.evaluate_every=0"])
    assert result.status == 0, result.out + result.err
    difference = re.search(
        r"as its makers' program computes it: the largest difference of a logit is (\S+),", result.out
    )
    assert difference is not None and float(difference[1]) < 1e-5
    found = newest_complete(run / "checkpoints")
    assert found is not None
    trained, source = WeightsFile(found[0]).load(), WeightsFile(both).load()
    assert {name.partition(".")[0] for name in set(trained) - set(source)} == {"connector", "layers"}
    for name, value in source.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-9, msg=name)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    return import_speaking(tmp_path_factory.mktemp("speaking"))


def test_a_run_and_its_export_speak_with_the_imported_tokenizer(tiny, speaking, tmp_path):
    recipe, run, export = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml"), tmp_path / "run", tmp_path / "export"
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--run-dir", run, "run.steps=2"]
    result = finish(start(python(TRAIN, *arguments, "data.workers=1")))
    assert result.status == 0, result.out + result.err
    result = finish(start(python(REPOSITORY / "launch" / "export.py", "--run", run, "--output", export), cold=True))
    assert result.status == 0, result.err
    found = newest_complete(run / "checkpoints")
    assert found is not None
    for folder in (found[0], export):
        assert (folder / "tokenizer.json").read_bytes() == (speaking / "tokenizer.json").read_bytes()
        assert not (folder / "tokenizer.model").exists()
    picture = tmp_path / "a.jpg"
    picture.write_bytes(scene(np.random.default_rng(0), True, 48, 2)[0])
    generate = python(REPOSITORY / "launch" / "generate.py", "caption", "--run", export, "--image", picture)
    result = finish(start(generate, cold=True))
    assert result.status == 0 and result.out.startswith(str(picture)), result.out + result.err
    trained = load_run(run)
    prompt = trained.task(CaptionTask).prompt(Sample("a", SourceConfig(), 0, picture.read_bytes(), "jpg", "", {}))
    assert prompt.tokens[0] == trained.tokenizer.vocabulary.row("<s>")
    assert prompt.pictures[0].cell_token[0] == 1 and prompt.tokens[1] == trained.tokenizer.control("<image>")
    with torch.inference_mode():
        hidden, _ = trained.model(prompt_batch(trained, [prompt]))
    assert torch.isfinite(hidden).all()


def test_another_tokenizer_than_that_of_the_weights_is_refused(tiny, speaking, tmp_path):
    recipe = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml")
    other = tiny.data / "tokenizer.model"
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--run-dir", tmp_path / "run"]
    for more in ([], ["--dry-run"]):
        result = finish(start(python(TRAIN, *arguments, *more, f"tokenizer.path={other}")))
        assert result.status != 0
        (line,) = [line for line in result.err.splitlines() if "is not that of the weights" in line]
        assert str(other) in line and str(speaking) in line and line.count("(pieces ") == 2
    (tmp_path / "bad.json").write_text("{")
    bad = ["--dry-run", f"tokenizer.path={tmp_path / 'bad.json'}"]
    result = finish(start(python(TRAIN, *arguments, *bad)))
    assert result.status == 2 and "bad.json cannot be read by tokenizers" in result.err and result.err.count("\n") == 1


def test_the_plan_shows_what_starts_from_nothing_and_how_large_it_is(tiny, speaking, both, tmp_path):
    """A vision encoder that was not imported is the recipe's own, by default a large one."""
    recipe = with_its_tokenizer(tiny, speaking, tmp_path / "r.toml")
    small = recipe.read_text()
    seen = small[small.index("[model.vision]") : small.index("[[data.sources]]")]
    cases = {r"vision \d+\.\d+ k": small, "vision 403.49 M": small.replace(seen, "")}
    for size, text in cases.items():
        recipe.write_text(text)
        result = finish(start(python(TRAIN, "--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--dry-run")))
        assert result.status == 0, result.err
        said = rf"\n  from first values +{size} \(its size: \[model\.vision\]\), connector \S+ k\n"
        assert re.search(said, result.out), result.out
    recipe.write_text(without_shapes(tiny, both))
    result = finish(start(python(TRAIN, "--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--dry-run")))
    assert re.search(r"\n  from first values +connector \S+ k", result.out), result.out


def test_the_plan_shows_where_the_model_comes_from(tiny, both, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(without_shapes(tiny, both))
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--dry-run"]
    result = finish(start(python(TRAIN, *arguments)))
    assert result.status == 0 and f"starts from           {both}" in result.out
    result = finish(start(python(TRAIN, *arguments, "model.width=64")))
    assert result.status == 2 and "model.width = 64" in result.err and "have 48" in result.err
    result = finish(start(python(TRAIN, *arguments, "model.init_from=nowhere")))
    assert result.status == 2 and "nowhere/model.json cannot be read" in result.err


def test_imported_weights_that_are_cut_short_end_training_with_their_name(tiny, both, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(both, cut)
    with next(cut.glob("model-*")).open("r+b") as file:
        file.truncate(5000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(without_shapes(tiny, cut))
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--run-dir", tmp_path / "run"]
    result = two_ranks(list(map(str, arguments)))
    assert result.status != 0 and result.err.count("error (rank ") == 1
    assert f"the weights of model.init_from = '{cut}' cannot be read" in result.err


def test_a_model_that_answers_otherwise_is_not_trained(tiny, both, tmp_path):
    """Two experts have changed places."""
    odd = tmp_path / "odd"
    shutil.copytree(both, odd)
    file = next(odd.glob("model-*"))
    weights = load_file(file)
    one, two = (f"layers.0.feed_forward.experts.{number}.w1" for number in (0, 1))
    weights[one], weights[two] = weights[two], weights[one]
    save_file(weights, file)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(without_shapes(tiny, odd))
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--run-dir", tmp_path / "run"]
    result = finish(start(python(TRAIN, *arguments)))
    assert result.status == 2 and f"{odd} does not answer as its makers' does" in result.err, result.err


def test_origin_names_every_tensor(both):
    origin = json.loads((both / "origin.json").read_text())
    assert set(origin["tensors"]) == set(WeightsFile(both).places)
    qkv = origin["tensors"]["layers.0.attention.qkv.weight"]
    assert [name.rpartition("self_attn.")[2] for name in qkv["from"]] == [f"{p}_proj.weight" for p in "qkv"]
    assert any("head.probe" in name for names in origin["left_out"].values() for name in names)
    assert "connector.up.weight" in origin["first_values"]


def changed(folders, part, tmp_path, change):
    """A copy of a folder, with its tensors changed by `change`."""
    folder = tmp_path / part
    shutil.copytree(folders / part, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _nan(weights):
    weights["model.norm.weight"][0] = float("nan")


BAD = {
    "an unknown tensor": (lambda w: w.update(odd=torch.ones(2)), r"no rule knows what to do with the tensor odd"),
    "a missing one": (lambda w: w.pop("model.norm.weight"), "has no tensor model.norm.weight, of which norm.weight is"),
    "another shape": (
        lambda w: w.update({"model.norm.weight": torch.ones(3)}),
        r"norm.weight from model.norm.weight of .* would be \[3\], but config.json says \[48\]",
    ),
    "not finite": (_nan, "model.norm.weight has values that are not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_named(folders, tmp_path, case):
    change, message = BAD[case]
    changed(folders, "text", tmp_path, change)
    result = imported(tmp_path, tmp_path / "output", "text")
    assert result.status == 2 and result.err.count("\n") == 1
    assert re.search(message, result.err), result.err


def test_bad_folders_are_named(folders, tmp_path):
    broken = tmp_path / "text"
    shutil.copytree(folders / "text", broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    cases = {
        broken: "model.safetensors cannot be read",
        tmp_path: "has no config.json",
        tmp_path / "none": "no config.json",
    }
    for folder, message in cases.items():
        result = finish(start(python(IMPORT, "--text", folder, "--output", tmp_path / "output")))
        assert result.status == 2 and message in result.err and result.err.count("\n") == 1
    result = finish(start(python(IMPORT, "--output", tmp_path / "output")))
    assert result.status == 2 and "give --text DIR, --vision DIR or both" in result.err


def test_a_dense_model_with_experts_made_of_it(tiny, tmp_path):
    """Its shapes follow from the options; what its maker chose for a loss is a default that a recipe may change."""
    dense = {name: value for name, value in DECODER.items() if "expert" not in name and "moe" not in name}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**dense)).save_pretrained(tmp_path / "text")
    output = tmp_path / "sparse"
    made = ["--text", tmp_path / "text", "--output", output, "--experts", "6", "--top-k", "3", "--first-dense", "1"]
    result = finish(start(python(IMPORT, *made), cold=True))
    assert result.status == 0, result.err
    settings = json.loads((output / "model.json").read_text())
    assert settings["moe"].items() >= {"experts": 6, "top_k": 3, "ffn_width": 80, "first_dense_layers": 1}.items()
    assert settings["defaults"]["moe"]["balance_weight"] == 0.01
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(without_shapes(tiny, output))
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", recipe, "--dry-run", "moe.balance_weight=0.5"]
    result = finish(start(python(TRAIN, *arguments)))
    assert result.status == 0 and "3 of 6 experts" in result.out, result.out + result.err


def test_a_whole_model_is_imported_and_trains(tiny, tmp_path):
    """With its probe and its tokenizer, whose piece for pictures becomes the symbol."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 48, "depth": 3, "num_heads": 3, "intermediate_size": 80, "patch_size": 8,
        "out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [4, 3, 3], "mrope_interleaved": True}
    ids = {"image_token_id": 302, "video_token_id": 304, "vision_start_token_id": 301, "vision_end_token_id": 301}
    config = transformers.Qwen3VLMoeConfig(vision_config=tower, text_config={**DECODER, "rope_parameters": rope}, **ids)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    byte_level(tmp_path / "whole" / "tokenizer.json")
    (tmp_path / "whole" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    result = imported(tmp_path, tmp_path / "model", "whole")
    assert result.status == 0, result.err
    settings = json.loads((tmp_path / "model" / "model.json").read_text())
    assert settings["tokenizer"]["controls"] == {"image": "<|image_pad|>", "video": "</s>"}
    assert "videos       frames have positions as still images one after another" in result.out
    origin = json.loads((tmp_path / "model" / "origin.json").read_text())
    assert all(name.endswith(("task_bias", "modality_bias")) for name in origin["first_values"])
    text = without_shapes(tiny, tmp_path / "model")
    (tmp_path / "recipe.toml").write_text(text[: text.index("[tokenizer]")] + text[text.index("[run]") :])
    arguments = ["--deepspeed", tiny.deepspeed(), "--recipe", tmp_path / "recipe.toml", "--run-dir", tmp_path / "run"]
    result = finish(start(python(TRAIN, *arguments, "run.steps=1", "run.samples_every=0", "run.evaluate_every=0")))
    assert result.status == 0 and "as its makers' program computes it" in result.out, result.out + result.err
