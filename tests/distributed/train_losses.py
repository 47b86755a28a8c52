"""Train a tiny model on fixed packs of all three tasks; rank 0 prints every step's terms and gradient norm as JSON.

The ranks stay for many jobs, since starting them takes longer than most of these.

Global pack n of a step is the same whatever the split: rank r takes packs r, r + ranks, ...
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from dsmoe_vl.checkpoint.manifest import read_manifest
from dsmoe_vl.checkpoint.training_state import Saver, optimizer_updates, restore
from dsmoe_vl.checkpoint.weights_file import WeightsFile
from dsmoe_vl.command import leave
from dsmoe_vl.config.model import ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import (
    RECOMPUTED,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    PartConfig,
    Recipe,
    SourceConfig,
    TasksConfig,
    TaskWeightsConfig,
    TokenizerConfig,
)
from dsmoe_vl.config.task_table import RetrievalConfig, SummaryConfig, TranscriptConfig
from dsmoe_vl.data.pack import collate
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.process_group import HostGroup, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.tasks.registry import build_backbone, build_tasks
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.step import OptimizerStep
from tests.support.batches import SHAPE, SPEECH, VOCABULARY, mixed_pack
from tests.support.checkpoints import save_weights

PACKS_PER_STEP = 4
# AdamW divides a gradient by its own size, so rounding alone moves a weight by up to the learning rate. Clipping makes
# some gradients as small as the usual 1e-8: then one weight moved by 3e-5 more or less, and the next norm by 2e-5.
EPSILON = 1e-6
LEARNING_RATE = 1e-3  # without warm-up, 3e-3 makes twenty times as much of a rounding error with every step
RECIPE = Recipe(
    model=ModelConfig(
        width=32, layers=3, heads=4, kv_heads=2, ffn_width=48,
        vision=VisionConfig(patch_size=SHAPE.patch_size, merge=2, width=16, layers=2, heads=2, ffn_width=24),
    ),
    moe=MoEConfig(experts=4, top_k=2, ffn_width=16, shared_ffn_width=8, first_dense_layers=1),
    train={
        "vision": PartConfig(lr_scale=0.5), "connector": PartConfig(lr_scale=0.5), "experts": PartConfig(lr_scale=0.5),
        "heads": PartConfig(lr_scale=0.25),
    },
    tasks=TasksConfig(retrieval=RetrievalConfig(1.0, embedding_width=16), summary=SummaryConfig(1.0)),
    data=DataConfig(
        sources=(SourceConfig("test", "unused"),), pack_length=SHAPE.length, pack_patches=SHAPE.patches,
        image_max_patches=16, frame_max_patches=8, lanes=8, workers=0,
    ),
    tokenizer=TokenizerConfig("unused", vocab_size=VOCABULARY),
)  # fmt: skip
# As weights of other makers want it: every switch of the decoder and of the encoder that adds or removes a parameter.
AS_OTHERS = replace(
    RECIPE.model, head_width=12, norm_eps=1e-5, qk_norm="width", qkv_bias=True, tied=False,
    vision=replace(
        RECIPE.model.vision, norm="layer", bias=True, qk_norm=False, ffn="gelu_tanh", layer_scale=True,
        positions="learned+rotary", position_grid=3, prefix_tokens=2, pre_norm=True, connector_norm="joined",
        place_and_time=False, connector_width=20, taps=(0, 1), placeholder="replace",
    ),
    rope_sections=(2, 2, 2),
)  # fmt: skip
MOE_AS_OTHERS = {"shared_gate": True, "renormalise": False}
ALL_TERMS = {
    "balance_over": "task", "local_entropy_weight": 0.01, "global_entropy_weight": 0.1, "global_entropy_experts": 4.0,
    "mutual_information_weight": 0.1, "bias_rate": 0.01,
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, required=True)
    parser.add_argument("--ep", type=int, required=True)
    parser.add_argument("--sub-group", type=int, help="zero_optimization.sub_group_size")
    parser.add_argument("--accumulation", type=int, help="of four packs; all of them by default")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--recompute", choices=RECOMPUTED, default="none")
    parser.add_argument("--caption-only", action="store_true")
    parser.add_argument("--all-terms", action="store_true", help="every balancing term there is")
    parser.add_argument("--as-others", action="store_true", help="a model with AS_OTHERS")
    parser.add_argument("--routing", default="token")
    parser.add_argument("--moe", type=json.loads, default={}, help="more settings of [moe], as JSON")
    parser.add_argument("--train", type=json.loads, help="the recipe's [train], as JSON")
    parser.add_argument("--lora", type=json.loads, default={}, help="the recipe's [lora], as JSON")
    parser.add_argument("--reload", type=Path, help="write the weights there and read them without the engine")
    parser.add_argument("--resume", type=Path, help="a checkpoint that --save wrote")
    parser.add_argument("--save", type=Path, metavar="RUN", help="write a checkpoint of the last step there")
    parser.add_argument("--contrast", default="info_nce")
    parser.add_argument("--gradient-cache", action="store_true")
    parser.add_argument("--task-weights", default="fixed")
    parser.add_argument("--hears", action="store_true", help="a model with a speech encoder, and recordings")
    parser.add_argument("--one-sided", action="store_true", help="text alone on rank 0, videos alone on the others")
    return parser.parse_args(arguments)


def main() -> None:
    """One job a line of standard input: its arguments, as a JSON list. Ends with the input."""
    ranks = Ranks.discover()
    on_cuda = "cuda" in sys.argv[1:]
    device = use_device("cuda" if on_cuda else "cpu", ranks)
    start_process_group(ranks, "cuda" if on_cuda else "cpu")
    for line in sys.stdin:
        faulthandler.dump_traceback_later(150, exit=True)
        found = train(parse(json.loads(line)), ranks, device)
        if ranks.rank == 0:
            print("found", json.dumps(found), flush=True)
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
    leave(0)


def train(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    accumulation = args.accumulation or PACKS_PER_STEP // ranks.world_size
    micro_batch = PACKS_PER_STEP // (ranks.world_size * accumulation)
    deepspeed = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "eps": EPSILON, "weight_decay": 0.1},
        },
        "zero_optimization": {"stage": args.zero, **({"sub_group_size": args.sub_group} if args.sub_group else {})},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": args.ep},
    }
    if args.bf16:
        deepspeed["bf16"] = {"enabled": True}
    experts = 6 if args.routing == "isolated" else RECIPE.moe.experts
    moe = replace(RECIPE.moe, routing=args.routing, experts=experts, **(ALL_TERMS if args.all_terms else {}))
    moe = replace(moe, **{key: tuple(value) if isinstance(value, list) else value for key, value in args.moe.items()})
    retrieval = replace(RECIPE.tasks.retrieval, loss=args.contrast, gradient_cache=args.gradient_cache)
    tasks = TasksConfig() if args.caption_only else replace(RECIPE.tasks, retrieval=retrieval)
    weights = ObjectiveConfig(task_weights=TaskWeightsConfig(args.task_weights))
    recipe = replace(RECIPE, moe=moe, tasks=tasks, objective=weights)
    if args.train is not None:
        recipe = replace(recipe, train={key: PartConfig(**table) for key, table in args.train.items()})
    recipe = replace(recipe, lora=LoraConfig(**args.lora), run=replace(recipe.run, recompute=args.recompute))
    if args.as_others:
        recipe = replace(recipe, model=AS_OTHERS, moe=replace(moe, **MOE_AS_OTHERS))
    if args.hears:
        tasks = replace(recipe.tasks, transcript=TranscriptConfig(1.0))
        data = replace(recipe.data, speech_max_seconds=3.0)
        recipe = replace(recipe, model=replace(recipe.model, speech=SPEECH), tasks=tasks, data=data)
    if args.save:
        run = replace(recipe.run, directory=str(args.save.parent), name=args.save.name)
        recipe = replace(recipe, run=run, tokenizer=replace(recipe.tokenizer, path=__file__))
    plan = resolve(recipe, deepspeed, ranks.world_size, device=device.type, bf16_unit=True)
    assert plan.ep_size == args.ep
    updates = optimizer_updates(args.resume) if args.resume else {}
    engine = build_engine(plan, ranks, build_tasks(recipe, None), updates)  # losses need no tokenizer
    take_step = OptimizerStep(plan, ranks, engine, HostGroup(), device)
    terms, norms, dropped = [], [], []
    seen: list[bool] = []
    engine.module.backbone.vision.register_forward_hook(lambda _, __, out: seen.append(out[0].requires_grad))
    first = 0
    if args.resume:
        manifest = read_manifest(args.resume)
        assert manifest is not None
        first = manifest.step
        take_step.load_state_dict(restore(args.resume, manifest, plan, ranks, engine))
    for step in range(first, first + args.steps):
        without = ("retrieval", "summary") if args.caption_only else ()
        if args.one_sided:
            without = ("image", "transcript") if ranks.rank else ("caption", "retrieval", "summary")
        own = range(ranks.rank, PACKS_PER_STEP, ranks.world_size)
        packs = [mixed_pack(100 * step + index, without, args.hears) for index in own]
        batches = [collate(packs[i : i + micro_batch]) for i in range(0, len(packs), micro_batch)]
        shared = take_step.share(batches)
        result = take_step(shared.batches, shared.counts)
        terms.append({name: float(value) for name, value in result.terms.items()})
        norms.append(result.grad_norm)
        dropped.append(float(result.routing.dropped.sum()))
    found = {"terms": terms, "norms": norms, "dropped": dropped, "through_vision": any(seen)}
    if args.zero == 3:
        owner = engine.optimizer
        flats = zip(owner.fp32_partitioned_groups_flat, owner.fp16_partitioned_groups_flat, strict=True)
        found["shares_masters"] = [master.data_ptr() == weights.data_ptr() for master, weights in flats]
    if args.save:
        file = SimpleNamespace(file_name="tokenizer.model")
        unread = SimpleNamespace(sha256="pieces", path=__file__, vocabulary=file)  # it is copied, not read
        saver = Saver(plan, ranks, HostGroup(), unread)  # type: ignore[arg-type]
        saver.prepare(engine)
        saver.begin(engine, first + args.steps, take_step.state_dict(), {})
        found["saved"] = str(saver.finish())
        saver.close()
    if args.reload:
        found["reloaded_difference"] = reloaded_difference(engine, recipe, args.zero, args.reload)
    dist.barrier()
    engine.destroy()
    return found


@torch.no_grad()
def reloaded_difference(engine: Any, recipe: Recipe, zero_stage: int, folder: Path) -> float:
    """The largest difference between the engine's hidden states and those of a one-process model with its weights."""
    folder.mkdir(exist_ok=True)
    save_weights(engine.module, folder)
    dist.barrier()
    model = build_backbone(recipe)
    weights = WeightsFile(folder).load()
    model.load_state_dict({**weights, "head.weight": weights["embedding.weight"]})
    batch = collate([mixed_pack(999)])
    engine.eval()
    ours, stats = engine.module.backbone(batch)
    again, _ = engine.module.backbone(batch)
    theirs, expected = model.eval()(batch)
    assert torch.equal(ours, again), "evaluation is not deterministic"
    assert torch.equal(stats.load, expected.load) and torch.equal(stats.dropped, expected.dropped)
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    main()
