"""Our models in lmms-eval, in an interpreter of its own: it needs many packages, some of other versions than ours."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from data_tools.synthetic.films import film
from data_tools.synthetic.scenes import scene
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.run import evaluate_run
from dsmoe_vl.evaluation.task_evaluation import Options
from dsmoe_vl.inference.generate import caption_task
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import read_file
from dsmoe_vl.inference.text_loss import text_losses
from tests.distributed.ranks import REPOSITORY, cpu_environment
from tests.support.trained import random_run

PYTHON = "DSMOE_VL_LMMS_PYTHON"
CHOICES = ["a red square", "a large blue ring left of a green cross", "one small cyan triangle"]
DOCUMENTS = 4

_FUNCTIONS = """
from PIL import Image

def photo(document):
    return [Image.open(document["photo"])]

def clip(document):
    return [document["clip"]]

def letters(document, results):
    return {"letters": float(len(results[0]))}
"""
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/documents.jsonl
  cache_dir: {folder}/cache
test_split: test
doc_to_visual: !function functions.{visual}
doc_to_text: "What is it?"
doc_to_target: target
"""
_GENERATED = """
output_type: generate_until
process_results: !function functions.letters
generation_kwargs: {settings}
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
"""
_CHOSEN = """
output_type: multiple_choice
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, targets: list[int]) -> None:
    """Photos, films and three tasks of lmms-eval about them."""
    documents = [
        {"photo": f"{folder}/{n}.jpg", "clip": f"{folder}/{n}.mp4", "choices": CHOICES, "target": targets[n]}
        for n in range(DOCUMENTS)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "functions.py").write_text(_FUNCTIONS)
    for name, visual, kind in [
        ("photos", "photo", _GENERATED.format(settings="{max_new_tokens: 8, temperature: 0, top_p: 1.0}")),
        ("clips", "clip", _GENERATED.format(settings="{max_new_tokens: 6, num_beams: 2, do_sample: false}")),
        ("choices", "photo", _CHOSEN),
    ]:
        (tasks / f"{name}.yaml").write_text(_TASK.format(name=f"tiny_{name}", folder=folder, visual=visual) + kind)


def write_entry_point(folder: Path) -> None:
    """What an installed package tells Python of itself, from pyproject.toml: that interpreter may not have ours."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    told = folder / "dsmoe_vl-0.1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: dsmoe-vl\nVersion: 0.1.0\n")
    (told / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in names.items())
            for group, names in table.items()
        )
    )


@pytest.fixture(scope="module")
def losses(tiny, tmp_path_factory):
    """A run, a folder of its media, and our loss of each choice for each photo."""
    folder = tmp_path_factory.mktemp("lmms")
    run = random_run(tiny, folder / "run")
    for n in range(DOCUMENTS):
        (folder / f"{n}.jpg").write_bytes(scene(np.random.default_rng(n), True, 48, 2)[0])
        (folder / f"{n}.mp4").write_bytes(film(np.random.default_rng(n), True, 48, 2)[0])
    trained = load_run(run)
    prompts = [caption_task(trained).prompt(read_file(folder / f"{n}.jpg", "image")) for n in range(DOCUMENTS)]
    return run, folder, [text_losses(trained, [prompt] * len(CHOICES), CHOICES) for prompt in prompts]


@pytest.fixture(scope="module")
def found(losses):
    """What `tests/support/lmms_eval_run.py` prints. The right choice of the first half is the most probable one."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no interpreter with lmms-eval: our models were not run by it")
    run, folder, expected = losses
    best = [int(np.argmin([choice.loss for choice in choices])) for choices in expected]
    half = DOCUMENTS // 2
    write_tasks(folder, best[:half] + [(index + 1) % len(CHOICES) for index in best[half:]])
    write_entry_point(folder)
    evaluate_run(Options(run, limit=3, show=0, max_tokens=6, lmms=True), Dealer())
    environment = cpu_environment(
        PYTHONPATH=f"{REPOSITORY}{os.pathsep}{folder}", HF_HUB_OFFLINE="1", HF_HOME=str(folder / "home")
    )
    done = subprocess.run(
        [python, "-m", "tests.support.lmms_eval_run", str(run), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def test_lmms_eval_gets_our_captions(found):
    """It strips them."""
    for task in ("tiny_photos", "tiny_clips"):
        ours = [text.strip() for text in found["ours"][task]]
        assert ours == [text.strip() for (text,) in found["answers"][task]] and len(ours) == DOCUMENTS
        assert found["scores"][task]["letters,none"] == np.mean([len(text) for text in ours])


def test_lmms_eval_gets_our_losses_and_takes_the_smallest(found, losses):
    _, _, expected = losses
    got = np.array([[loss for loss, _ in choices] for choices in found["answers"]["tiny_choices"]], float)
    np.testing.assert_allclose(got, [[choice.loss for choice in choices] for choices in expected], atol=1e-5, rtol=1e-5)
    assert found["scores"]["tiny_choices"]["acc,none"] == 0.5


def test_settings_of_a_generation(found):
    direct = found["direct"]
    whole = direct["whole"]
    assert direct["stopped"] == whole[: whole.index(whole[3])] and direct["greedy"] == whole
    assert direct["samples"] == found["ours"]["samples"]
    assert "generation_kwargs.repetition_penalty is not used" in found["stderr"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("two pictures", "DataError: task t, document 0 has 2 pictures"),
        ("no picture", "DataError: task t, document 0 has 0 pictures"),
        ("beams and sampling", "ConfigError: generation_kwargs of task t: beams = 3 and top_p = 0.9 exclude"),
        ("argument", "ConfigError: --model_args has pretrained: give run=FOLDER"),
        ("no run", "ConfigError: --model_args gives no run: give run=FOLDER"),
        ("batch", "ConfigError: --batch_size = 'many': must be a whole number"),
        ("rounds", "NotImplementedError: models of dsmoe_vl caption and do not converse"),
        ("without its picture", "ConfigError: task t: it asks for the probability of a text without its picture"),
    ],
)
def test_what_our_models_cannot_do(found, what, message):
    assert found["direct"]["refusals"][what].startswith(message)


def test_lmms_eval_reads_our_results(found):
    read = found["read"]
    assert read["same"] and read["documents"] == [0, 1, 2]
    assert "|images_eval_caption|none" in read["table"].replace(" ", "") and "cider_d" in read["table"]
