"""Generation with the cache against the full forward over everything that was generated."""

import numpy as np
import torch

from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.inference.generate import generate, prompt_batch
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.vlm import VisionLanguageModel
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.tasks.pictures import PictureReader
from tests.unit.test_caption_task import sample

TOKENS = 12


def test_cached_tokens_and_logits_equal_the_full_forward(tiny, monkeypatch):
    recipe = load_recipe(tiny.recipe)
    tokenizer = Tokenizer(tiny.data / "tokenizer.model")
    model = VisionLanguageModel(recipe).eval()
    initialise(model, seed=3)
    with torch.no_grad():  # the first values give near-equal logits; these make the choices clear
        model.embedding.weight.mul_(20)
    trained = TrainedModel(model, tokenizer, recipe, tiny.folder, torch.device("cpu"))
    task = CaptionTask(PictureReader(recipe.data, recipe.model.vision), tokenizer)
    prompts = [task.prompt(sample(kind, number=n)) for kind, n in [("image", 0), ("video", 1), ("image", 2)]]
    monkeypatch.setattr(type(tokenizer), "eos", property(lambda _: -1))  # none ends early

    seen = []
    hook = model.head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    written = generate(trained, prompts, TOKENS)
    hook.remove()
    cached = torch.stack(seen, dim=1)  # [S, TOKENS, V]
    assert [len(tokens) for tokens in written] == [TOKENS] * 3

    whole = [
        Segment(
            prompt.task,
            np.concatenate((prompt.tokens, np.asarray(tokens[:-1], np.int32))),
            np.full(prompt.length + TOKENS - 1, IGNORE, np.int32),
            np.concatenate((prompt.modality, np.full(TOKENS - 1, Modality.TEXT, np.int32))),
            prompt.pictures,
        )
        for prompt, tokens in zip(prompts, written, strict=True)
    ]
    with torch.inference_mode():
        hidden, _ = model(prompt_batch(trained, whole))
        logits = model.head(hidden)
    ends = np.cumsum([segment.length for segment in whole])
    for row, end in enumerate(ends):
        full = logits[end - TOKENS : end]
        torch.testing.assert_close(cached[row], full, rtol=1e-4, atol=1e-4)
        assert full.argmax(-1).tolist() == written[row]
