"""Training from vectors of words: the plan says how many pieces there are, and every topology starts from the same."""

from __future__ import annotations

import json

import numpy as np
import torch

from dsmoe_vl.checkpoint.store import newest_complete
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.data.word_start import read_word_start
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.word_rows import fill_words
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.keyed_vectors import write_vectors
from tests.support.runs import TRAIN, finish, python, start, two_ranks


def test_every_topology_starts_from_the_same_vectors(tiny, tmp_path):
    tokenizer = Tokenizer(tiny.data / "tokenizer.model")
    words = [*list(tokenizer.words())[:6], "elsewhere"]
    vectors = np.random.default_rng(4).normal(size=(7, 20)).astype(np.float32)
    write_vectors(tmp_path / "v.bin", words, vectors)
    setting = f"model.embedding_from={tmp_path / 'v.bin'}"
    dry = finish(start(python(TRAIN, "--dry-run", *tiny.arguments(tmp_path / "run", setting))))
    assert dry.status == 0, dry.err
    assert f"\nembedding starts from {tmp_path / 'v.bin'}: 6 of 320 pieces are among its 7 words" in dry.out
    absent = finish(start(python(TRAIN, "--dry-run", *tiny.arguments(tmp_path / "run", f"{setting}.gone"))))
    assert absent.status == 0 and f"not here yet: model.embedding_from: {tmp_path / 'v.bin'}.gone\n" in absent.out

    recipe = load_recipe(tiny.recipe, [setting])
    model = build_backbone(recipe)
    initialise(model, recipe.run.seed)
    wanted = model.embedding.weight.detach()
    fill_words("embedding.weight", wanted, read_word_start(recipe, tokenizer), recipe.run.seed)
    still = [setting, "run.steps=1", "run.evaluate_every=0", "run.samples_every=0"]
    for name, ranks, stage in (("one", 1, 2), ("two", 2, 2), ("parts", 2, 3)):
        config = json.loads(tiny.deepspeed(stage).read_text())
        config["optimizer"]["params"] |= {"lr": 1e-12, "weight_decay": 0.0}
        (tmp_path / "ds.json").write_text(json.dumps(config))
        arguments = [*tiny.arguments(tmp_path / name, *still), "--deepspeed", str(tmp_path / "ds.json")]
        result = finish(start(python(TRAIN, *arguments))) if ranks == 1 else two_ranks(arguments)
        assert result.status == 0, result.out + result.err
        assert f"note: embedding starts from {tmp_path / 'v.bin'}: 6 of 320 pieces" in result.out
        found = newest_complete(tmp_path / name / "checkpoints")
        assert found is not None
        trained = WeightsFile(found[0]).read("embedding.weight")
        torch.testing.assert_close(trained, wanted, rtol=0, atol=1e-9, msg=name)
