"""One curve of learning.py, in a process of its own: trains one variant with one seed, scores it, prints JSON lines.

    python benchmarks/learning_run.py retrieval --seed 1 [--pairs 66000] [--rate 3e-4] [section.key=value ...]

A line: samples seen so far, CPU seconds of training so far (data included, scoring not), R@1 among all held-out
pictures and all their texts, the share of held-out pictures whose generated caption is one of their texts (of every
third), and the captions' loss, nats a token.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import numpy as np
import torch
import torch.nn.functional as functional
from dual_encoder import DualEncoder, Pairs, feature_reader, features
from dual_encoder import train as train_dual_encoder
from record import ROOT
from run import DEEPSPEED
from torch import Tensor

from dsmoe_vl.command import leave
from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe, SourceConfig, learned_tasks
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.decode import decode_image, resized
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.evaluation.captions import caption_samples
from dsmoe_vl.evaluation.retrieval import evaluate_retrieval
from dsmoe_vl.inference.load import TrainedModel
from dsmoe_vl.metrics.retrieval import retrieval_metrics
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.tasks.retrieval import pair_id

RECIPE, PRETRAINED = ROOT / "benchmarks/learning.toml", ROOT / "benchmarks/pretrained_pictures.toml"
_SPARSE = "train.experts.lr_scale=2"  # each expert sees a quarter of the tokens
VARIANTS: dict[str, tuple[str, ...]] = {
    "retrieval": ("tasks.caption.weight=0", _SPARSE),
    "captions": ("tasks.retrieval.weight=0", _SPARSE),
    "together": (_SPARSE,),
    "together, experts 1e-3": ("train.experts.lr_scale=3.33",),
    "together, dense": ("moe.first_dense_layers=4", "model.ffn_width=512"),  # equal active FLOPs
}
DUAL_ENCODER = "plain dual encoder"
REAL, FROZEN = "retrieval, from real weights", "frozen DINOv2-small, two small networks"  # of pretrained_pictures.py
_CAPTIONED = 3  # of so many held-out samples, one gets a caption: writing takes longer than the other scores
_BATCH = 110  # samples of a step, about
_SLACK = 1.03  # of a pack's room over what its samples take
_MAX_TOKENS = 12  # of a caption
_SIDE = 64  # pixels; the dual encoder's pictures


def held_out(recipe: Recipe) -> list[Sample]:
    """The held-out samples, with different content."""
    found: dict[int, Sample] = {}
    for source in recipe.data.evaluation:
        for sample in iterate_samples(source):
            found.setdefault(pair_id(sample), sample)
    return list(found.values())


def sized(recipe: Recipe, pairs: int) -> Recipe:
    """Packs of _BATCH samples, whatever tasks they serve, and as many steps as see `pairs` of them."""
    encode = Encoder(build_tasks(recipe, Tokenizer.of(recipe)))
    segments = [encode(sample) for sample in islice(iterate_samples(recipe.data.sources[0]), 200)]
    tokens = np.mean([sum(segment.length for segment in of_sample) for of_sample in segments])
    patches = np.mean([sum(len(p.patches) for s in of_sample for p in s.pictures) for of_sample in segments])
    cell = recipe.model.vision.merge**2
    data = replace(
        recipe.data,
        pack_length=round(_BATCH * _SLACK * tokens),
        pack_patches=-(-round(2 * _BATCH * patches) // cell) * cell,
    )
    return replace(recipe, data=data, run=replace(recipe.run, steps=round(pairs / _BATCH)))


def train(plan: RunPlan, points: int) -> Iterator[tuple[TrainedModel, int, float, dict[str, float]]]:
    """At each of the points: the model, samples seen, CPU seconds, held-out losses."""
    from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
    from dsmoe_vl.training.engine import build_engine
    from dsmoe_vl.training.held_out import HeldOut
    from dsmoe_vl.training.step import OptimizerStep

    ranks, recipe, device = Ranks(0, 1, 0), plan.recipe, torch.device("cpu")
    start_process_group(ranks, "cpu")
    tokenizer = Tokenizer.of(recipe)
    tasks = build_tasks(recipe, tokenizer)
    engine = build_engine(plan, ranks, tasks)
    host = HostGroup()
    take_step = OptimizerStep(plan, ranks, engine, host, device)
    held_out_packs = HeldOut(plan, ranks, Encoder(build_tasks(recipe, tokenizer, training=False)), host)
    data, vision = recipe.data, recipe.model.vision
    loader = Loader(
        data, data.sources, Encoder(tasks), vision.patch_size, vision.merge, recipe.run.seed, rank=0, ranks=1,
        micro_batch=plan.micro_batch, accumulation=plan.accumulation,
    )  # fmt: skip
    seconds, started = 0.0, time.process_time()
    for step, batches in zip(range(1, recipe.run.steps + 1), loader, strict=False):
        shared = take_step.share(batches)
        take_step(shared.batches, shared.counts)
        if step * points // recipe.run.steps > (step - 1) * points // recipe.run.steps:
            seconds += time.process_time() - started
            samples = sum(value for name, value in loader.report().items() if name.endswith("/samples"))
            losses = held_out_packs.losses(engine, device)
            engine.eval()
            yield TrainedModel(engine.module.backbone, tokenizer, recipe, Path(), device), samples, seconds, losses
            engine.train()
            started = time.process_time()


@torch.no_grad()
def scores(trained: TrainedModel, samples: list[Sample]) -> dict[str, float]:
    """Of the tasks that it has learned."""
    names = [spec.name for spec in learned_tasks(trained.recipe)]
    found: dict[str, float] = {}
    if "retrieval" in names:
        found |= recalls(evaluate_retrieval(trained, samples, len(samples)))
    if "caption" in names:
        captioned = samples[::_CAPTIONED]
        right = [
            said.generated.casefold() in {text.casefold() for text in contents_of(said.sample).captions}
            for said in caption_samples(trained, iter(captioned), _MAX_TOKENS)
        ]
        found["captions"] = sum(right) / len(captioned)
    return found


def recalls(metrics: dict[str, float]) -> dict[str, float]:
    """R@1 and R@10 in both directions, 0 to 1."""
    return {f"{way}_r{k}": metrics[f"{way}_r{k}"] for k in (1, 10) for way in ("text_to_media", "media_to_text")}


def pairs_of(samples: list[Sample]) -> Pairs:
    """For the dual encoder: everything decoded once."""
    numbers: dict[int, int] = {}
    pictures = [np.array(resized(decode_image(sample.media or b""), _SIDE, _SIDE)) for sample in samples]
    content = [numbers.setdefault(pair_id(sample), len(numbers)) for sample in samples]
    texts = [list(contents_of(sample).captions) for sample in samples]
    return Pairs(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), texts, torch.tensor(content))


@torch.no_grad()
def dual_encoder_scores(model: DualEncoder, pairs: Pairs) -> dict[str, float]:
    """As `scores`."""
    media = torch.cat([model.embed_pictures(part) for part in pairs.pictures.split(128)])
    texts = [features(text) for of_picture in pairs.texts for text in of_picture]
    text = torch.cat([model.embed_texts(texts[at : at + 256]) for at in range(0, len(texts), 256)])
    owners = np.repeat(np.arange(len(media)), [len(of_picture) for of_picture in pairs.texts])
    return recalls(retrieval_metrics(media.numpy(), text.numpy(), owners))


def _dual_encoder_curve(args: argparse.Namespace, recipe: Recipe, samples: list[Sample]) -> Iterator[dict[str, Any]]:
    learned = [sample for source in recipe.data.sources for sample in iterate_samples(SourceConfig.at(source.path))]
    steps, (train_pairs, tests) = round(args.pairs / _BATCH), map(pairs_of, (learned, samples))
    reader: Callable[[], Any] = lambda: None  # noqa: E731
    if args.variant == FROZEN:
        train_pairs, tests = (replace(pairs, pictures=dino_features(pairs.pictures)) for pairs in (train_pairs, tests))
        reader = partial(feature_reader, tests.pictures.shape[1])
    for model, pairs, seconds in train_dual_encoder(
        train_pairs, steps, _BATCH, args.seed, -(-steps // args.points), reader
    ):
        yield {"pairs": pairs, "seconds": seconds, **dual_encoder_scores(model, tests)}


@torch.no_grad()
def dino_features(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 [N, 2 widths]: the class token and the mean of the patches, by transformers."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(ROOT / "data/pretrained/dinov2").eval()
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = []
    for part in pictures.split(64):
        pixels = functional.interpolate(part.float() / 255, size=(56, 56), mode="bicubic", antialias=True)
        states = model(pixel_values=(pixels.clamp(0, 1) - mean) / spread).last_hidden_state
        found.append(torch.cat((states[:, 0], states[:, 1:].mean(1)), -1))
    return torch.cat(found)


def curve(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The points of one variant."""
    overrides = (f"run.seed={args.seed}", *VARIANTS.get(args.variant, ()), *args.overrides)
    recipe = load_recipe(PRETRAINED if args.variant == REAL else RECIPE, overrides)
    samples = held_out(recipe)
    if args.variant in (DUAL_ENCODER, FROZEN):
        yield from _dual_encoder_curve(args, recipe, samples)
        return
    deepspeed = load_deepspeed(DEEPSPEED)
    deepspeed["optimizer"]["params"]["lr"] = args.rate
    schedule = deepspeed["scheduler"]["params"]
    recipe = sized(recipe, args.pairs)
    schedule["warmup_num_steps"] = max(min(schedule["warmup_num_steps"], recipe.run.steps // 8), 1)  # of few steps
    plan = resolve(recipe, deepspeed, 1, device="cpu", bf16_unit=False)
    for trained, pairs, seconds, losses in train(plan, args.points):
        loss = {"caption_loss": losses["eval_loss_caption"]} if "eval_loss_caption" in losses else {}
        yield {"pairs": pairs, "seconds": seconds, **scores(trained, samples), **loss}


def main() -> int:
    """Print the points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=[*VARIANTS, DUAL_ENCODER, REAL, FROZEN])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=66_000, help="samples to see")
    parser.add_argument("--points", type=int, default=6, help="points of the curve")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak learning rate, as `launch/doctor.py lr` finds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    os.chdir(ROOT)  # where the recipe's paths begin
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for point in curve(args):
        print(json.dumps(point), flush=True)
    return 0


if __name__ == "__main__":
    leave(main())
