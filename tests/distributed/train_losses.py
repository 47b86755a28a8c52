"""Train a tiny model on fixed packs and print, as JSON, the losses and gradient norms of every step (rank 0).

Global pack n of a step is the same whatever the split: rank r takes packs r, r + ranks, ...
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist

from dsmoe_vl.config.recipe import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    Recipe,
    SourceConfig,
    TokenizerConfig,
    VisionConfig,
)
from dsmoe_vl.config.resolve import resolve
from dsmoe_vl.objective.objective import Objective, uniform_load
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.launch import HostGroup, start_process_group
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.tasks.caption import CaptionTask
from dsmoe_vl.training.engine import build_engine
from tests.batches import random_batch

PACKS_PER_STEP = 2
RECIPE = Recipe(
    model=ModelConfig(
        width=32, layers=3, heads=4, kv_heads=2, ffn_width=48,
        vision=VisionConfig(patch_size=4, merge=2, width=16, layers=2, heads=2, ffn_width=24),
    ),
    moe=MoEConfig(experts=4, top_k=2, ffn_width=16, shared_ffn_width=8, first_dense_layers=1),
    data=DataConfig(
        sources=(SourceConfig("test", "unused"),), pack_length=64, pack_patches=64, image_max_patches=16,
        frame_max_patches=8, lanes=8, workers=0,
    ),
    tokenizer=TokenizerConfig("unused", vocab_size=64),
)  # fmt: skip


def pack(step: int, index: int):
    """Different numbers of targets in every pack: a mean of means would show."""
    seed = 100 * step + index
    lengths = [20, 9, 11] if seed % 2 else [30]
    return random_batch(lengths, 64, 4, 2, [(4, 4), (2, 4)][: len(lengths)], seed=seed, padding=64 - sum(lengths))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, required=True)
    parser.add_argument("--ep", type=int, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    ranks = Ranks.discover()
    device = use_device(args.device, ranks.local_rank)
    start_process_group(ranks, args.device)
    accumulation = PACKS_PER_STEP // ranks.world_size
    deepspeed = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {"stage": args.zero},
        "gradient_clipping": 1.0,
        "expert_parallel": {"enabled": True, "autoep_size": args.ep},
    }
    if args.bf16:
        deepspeed["bf16"] = {"enabled": True}
    if args.checkpointing:
        deepspeed["activation_checkpointing"] = {}
    plan = resolve(RECIPE, deepspeed, ranks.world_size, device=args.device, bf16_unit=True)
    assert plan.ep_size == args.ep
    task = CaptionTask.__new__(CaptionTask)  # its loss needs no tokenizer
    engine = build_engine(plan, ranks, (task,))
    objective, host = Objective(plan), HostGroup()
    load_fraction = uniform_load(2, RECIPE.moe.experts, device)
    losses, norms = [], []
    for step in range(args.steps):
        batches = [pack(step, ranks.rank + micro * ranks.world_size) for micro in range(accumulation)]
        names = ("tokens", "caption")
        counts = dict(zip(names, host.sum([sum(b.counts[n] for b in batches) for n in names]), strict=True))
        total, load = torch.zeros(4, device=device), torch.zeros(2, RECIPE.moe.experts, device=device)
        for batch in batches:
            output, stats = engine(batch.to(device))
            loss = objective(output, stats, counts, load_fraction)
            engine.backward(loss.scalar)
            engine.step()
            total += torch.stack([loss.terms[n] for n in ("loss", "loss_caption", "balance_loss", "z_loss")])
            load += stats.load.sum((1, 2))
        dist.all_reduce(total)
        dist.all_reduce(load)
        load_fraction = load / load.sum(-1, keepdim=True)
        losses.append(total.tolist())
        norms.append(float(engine.get_global_grad_norm()))
    if ranks.rank == 0:
        print(json.dumps({"losses": losses, "norms": norms}))
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
