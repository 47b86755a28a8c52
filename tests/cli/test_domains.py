"""docs/domains.md: its calls and recipes work on small files: converted, trained for two steps, scored."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from data_tools import convert
from data_tools.formats import dicom
from data_tools.synthetic.scenes import scene
from dsmoe_vl.data.decode import decode_image
from tests.conftest import REPOSITORY
from tests.support.datasets import written
from tests.support.domain_files import PATIENT, pdf_of, write_dicom
from tests.support.runs import finish, python, start
from tests.support.tars import encoded_as
from tests.support.tokenizers import byte_level

for module in ("transformers", "tokenizers", "pydicom", "pypdfium2", "reportlab"):
    pytest.importorskip(module, reason=f"{module}: docs/domains.md was not checked")

PAGE = (REPOSITORY / "docs" / "domains.md").read_text()
SHARED, *FIELDS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
DECODER = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 32,
    "intermediate_size": 48,
}  # fmt: skip
# The parts that train as they are, those that train by adapters, and those that do not.
TRAINED = {
    "Medicine": ("connector router heads", "vision attention experts", "embedding feed_forward"),
    "Finance": ("vision connector router heads", "attention feed_forward experts", "embedding"),
    "Remote sensing": ("connector router heads", "attention feed_forward experts", "vision embedding"),
}
# What a test cannot afford; the rest is the page's.
SMALL = (
    "run.steps=2", "run.evaluate_every=2", "run.evaluate_packs=1", "run.samples_every=0", "data.workers=0",
    "data.pack_length=512", "data.pack_patches=512", "data.image_max_patches=64", "data.frame_max_patches=16",
    "data.lanes=2", "data.lookahead=4", "data.shuffle_block=4",
)  # fmt: skip


def recipe_of(section):
    (found,) = re.findall(r"^```toml\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return found


def calls(section):
    """The words of every command in the blocks of a section."""
    lines = "".join(re.findall(r"^ {4}.*\n", section, flags=re.MULTILINE)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def saved(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def picture(number, form="JPEG"):
    data = scene(np.random.default_rng(number), True, 48, 2)[0]
    return encoded_as(Image.fromarray(decode_image(data)), form)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The files that the page's calls name, and the models to import."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("domains")
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)).save_pretrained(folder / "QWEN3")
    byte_level(folder / "QWEN3" / "tokenizer.json")
    written(folder / "QWEN3" / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)).save_pretrained(folder / "SIGLIP2")

    for part, numbers in (("train", range(8)), ("test", range(8, 11))):
        rows = "".join(f'ROCO_{n:05d},"CT of part {n}, axial"\n' for n in numbers)
        written(folder / f"roco/{part}.csv", f"ID,Caption\n{rows}")
        saved(
            folder / f"filings{'_test' * (part == 'test')}/2024/a.pdf",
            pdf_of([f"Revenue {n}\nCosts {n}" for n in numbers]),
        )
    for n in range(11):
        saved(folder / f"roco/images/ROCO_{n:05d}.jpg", picture(n))
        saved(folder / f"charts/{n}.png", picture(n, "PNG"))
        saved(folder / f"ucm/imgs/{n}.tif", picture(n, "TIFF"))
        pixels = np.random.default_rng(n).integers(-1000, 1000, (24, 24), dtype=np.int16)
        write_dicom(folder / f"study/{n}.dcm", pixels)
    for name, file in (("charts", "{}.png"), ("study", "{}.dcm")):
        rows = "".join(f"{file.format(n)},what {n} shows\n" for n in range(11))
        written(folder / name / "captions.csv", f"file,text\n{rows}")
    images = [
        {"filename": f"{n}.tif", "imgid": n, "split": "train" if n < 8 else "test", "sentids": [n],
         "sentences": [{"raw": f"There are {n} planes .", "imgid": n, "sentid": n, "tokens": ["There"]}] * 5}
        for n in range(11)
    ]  # fmt: skip
    written(folder / "ucm/dataset.json", {"images": images, "dataset": "ucm"})
    return folder


@pytest.fixture
def at(world, monkeypatch):
    """The folder of the files, as the working directory."""
    monkeypatch.chdir(world)
    return world


def program(words, monkeypatch):
    """The functions of `python launch/NAME.py ...`, with these words as its command line."""
    monkeypatch.setattr(sys, "argv", words[1:])
    return runpy.run_path(str(REPOSITORY / words[1]))


@pytest.fixture
def imported(at, monkeypatch):
    """What the recipes start from, by the page's call."""
    (words,) = [words for words in calls(SHARED) if "launch/import_hf.py" in words]
    if not (at / "imported").exists():
        assert program(words, monkeypatch)["main"]() == 0


@pytest.mark.parametrize("section", FIELDS, ids=lambda section: section.partition("\n")[0])
def test_a_field_from_raw_files_to_scores(at, imported, monkeypatch, section, capsys):
    found = calls(section)
    for words in found:
        if words[:3] == ["python", "-m", "data_tools.convert"]:
            assert convert.main([*words[3:], "--workers", "1"]) == 0, capsys.readouterr()
    assert "rejected: none" in capsys.readouterr().out
    (at / "my_recipe.toml").write_text(recipe_of(SHARED) + recipe_of(section))
    (train,) = [words for words in found if words[0] == "deepspeed"]
    run = at / train[train.index("--run-dir") + 1]
    done = finish(start(["env", "-C", str(at), *python(*train[1:], *SMALL)]))
    assert done.status == 0, done.out + done.err
    assert "step 2/2  held-out" in done.out
    assert trained_parts(run) == tuple(set(parts.split()) for parts in TRAINED[section.partition("\n")[0]])
    (evaluate,) = [words for words in found if words[:2] == ["python", "launch/evaluate.py"]]
    assert "--run" in evaluate and at / evaluate[evaluate.index("--run") + 1] == run
    functions = program([*evaluate, "--max-tokens", "4"], monkeypatch)
    assert functions["evaluate"](functions["parse"]()) == 0
    (scores,) = json.loads((run / "eval.json").read_text()).values()
    assert set(scores) == {"caption", "retrieval"} & set(evaluate)
    assert all(one["samples"] >= 3 for one in scores.values())


def trained_parts(run):
    plan = json.loads((run / "plan.json").read_text())["trained"]
    trains, frozen = ({part for part, count in plan[name].items() if count} for name in ("trained", "frozen"))
    return trains - frozen, trains & frozen, frozen - trains


def test_what_the_page_says_is_dropped():
    """Tags of DICOM, none of which is kept; what is kept is named too."""
    from pydicom.datadict import tag_for_keyword

    part = PAGE.partition("### What is dropped")[2].partition("Three more places")[0]
    kept, _, dropped = part.partition("Every other tag is dropped")
    assert tuple(re.findall(r"`(\w+)`", kept)) == dicom.KEPT
    names = re.findall(r"`(\w+)`", dropped)
    assert [name for name in names if tag_for_keyword(name) is None] == []
    assert not set(names) & {*dicom.KEPT, *dicom.TEXT_TAGS}
    assert set(PATIENT) - set(names) <= {"SeriesDate"}
