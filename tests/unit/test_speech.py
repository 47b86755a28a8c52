"""The speech encoder: a recording's tokens depend on it alone, and every batch uses every parameter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dsmoe_vl.config.model import FRAMES_OF_STATE, ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import Recipe, TokenizerConfig
from dsmoe_vl.data.pack import assemble, collate
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.recording import whole_cells
from dsmoe_vl.model.attention import SegmentLayout
from dsmoe_vl.model.init import initialise
from dsmoe_vl.model.speech import SpeechEncoder
from dsmoe_vl.planner.parameters import tensors
from dsmoe_vl.tasks.registry import build_backbone
from tests.support.batches import CELL, HEARING, SHAPE, SPEECH, VOCABULARY, caption, spoken


def _mel(rng, frames):
    return whole_cells(rng.normal(size=(frames, SPEECH.bands)).astype(np.float32), SPEECH.merge)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    encoder = SpeechEncoder(SPEECH, 24)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.double().eval()


def _encoded(encoder, recordings):
    states = [len(mel) // FRAMES_OF_STATE for mel in recordings]
    layout = SegmentLayout(torch.tensor([0, *np.cumsum(states)], dtype=torch.int32), max(states))
    return encoder(torch.from_numpy(np.concatenate(recordings)), layout)


def test_a_recording_does_not_depend_on_its_neighbours(encoder):
    rng = np.random.default_rng(2)
    recordings = [_mel(rng, frames) for frames in (1, 37, CELL - FRAMES_OF_STATE, CELL, 100, 5)]
    together = _encoded(encoder, recordings)
    alone = torch.cat([_encoded(encoder, [mel]) for mel in recordings])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert len(together) == sum(len(mel) // CELL for mel in recordings)


def test_its_last_frame_and_its_first_are_heard(encoder):
    rng = np.random.default_rng(3)
    for frames in (1, 2, 3, 4, CELL, CELL + 1):
        mel = _mel(rng, frames)
        before = _encoded(encoder, [mel])
        for place in (0, frames - 1):
            changed = mel.copy()
            changed[place] += 1.0
            assert not torch.allclose(before, _encoded(encoder, [changed]), atol=1e-6), (frames, place)


def test_recordings_in_packs_are_placed_at_their_tokens():
    rng = np.random.default_rng(4)
    first, second, third = spoken(rng, 50), spoken(rng, 9), spoken(rng, 80)
    third.recording.first = 2  # such as after two vision tokens
    picture = caption(rng)
    batch = collate([assemble([*picture, first], HEARING), assemble([], HEARING), assemble([second, third], HEARING)])
    lengths = [len(one.recording.mel) // FRAMES_OF_STATE for one in (first, second, third)]
    assert batch.cu_recordings.tolist() == [0, *np.cumsum(lengths)] and batch.max_recording == max(lengths)
    starts = [picture[0].length, 2 * SHAPE.length, 2 * SHAPE.length + second.length + 2]
    wanted = [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n // SPEECH.merge)]
    assert batch.speech_position.tolist() == wanted
    assert batch.mel.shape == (sum(lengths) * FRAMES_OF_STATE, SPEECH.bands)


def test_packs_without_speech_have_one_cell_of_silence_only_if_the_model_hears():
    rng = np.random.default_rng(5)
    hearing = collate([assemble(caption(rng), HEARING)] * 2)
    assert hearing.mel.shape == (CELL, SPEECH.bands) and not hearing.mel.any()
    assert hearing.speech_position.tolist() == [2 * SHAPE.length]
    deaf = collate([assemble(caption(rng), SHAPE)])
    assert not len(deaf.mel) and not len(deaf.speech_position) and deaf.max_recording == 0


def _recipe(speech=SPEECH):
    recipe = Recipe(
        model=ModelConfig(width=32, layers=2, heads=4, kv_heads=2, ffn_width=48, speech=speech,
                          vision=VisionConfig(patch_size=4, width=16, layers=1, heads=2, ffn_width=16)),
        moe=MoEConfig(experts=4, ffn_width=16),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    )  # fmt: skip
    model = recipe.model
    tasks = recipe.tasks
    if speech.layers:
        tasks = dataclasses.replace(tasks, transcript=dataclasses.replace(tasks.transcript, weight=1.0))
    return dataclasses.replace(recipe, model=model, tasks=tasks)


def test_every_batch_uses_every_parameter_of_the_encoder():
    recipe = _recipe()
    model = build_backbone(recipe)
    initialise(model, 1)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == tensors(recipe)
    vision = recipe.model.vision
    shape = PackShape(SHAPE.length, 4 * vision.merge**2, vision.patch_size, vision.merge, HEARING.speech)
    rng = np.random.default_rng(6)
    for segments, is_heard in (([spoken(rng, 40)], True), ([], False)):
        model.zero_grad()
        hidden, _ = model(collate([assemble(segments, shape)]))
        hidden.square().sum().backward()
        of_speech = [p.grad for name, p in model.named_parameters() if name.startswith("speech.")]
        assert all(grad is not None for grad in of_speech)
        assert any(grad.any() for grad in of_speech) == is_heard


def test_a_model_without_a_speech_encoder_has_nothing_of_it():
    deaf, hearing = (tensors(_recipe(dataclasses.replace(SPEECH, layers=layers))) for layers in (0, 2))
    assert not [name for name in deaf if name.startswith("speech")]
    router = "layers.1.feed_forward.router."
    assert [deaf[f"{router}{what}_bias"][0] for what in ("task", "modality")] == [3, 3]
    assert [hearing[f"{router}{what}_bias"][0] for what in ("task", "modality")] == [4, 4]
