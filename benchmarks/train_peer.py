"""A whole training step beside the same model written with transformers' modules and DeepSpeed.

    python benchmarks/train_peer.py [--micro-batch N] [--steps N] [--json FILE]
    deepspeed --num_accelerators 2 benchmarks/train_peer.py

Qwen3-MoE at the quickstart's sizes, on texts of one length, so that no side pads. Theirs is `Qwen3MoeForCausalLM` in a
DeepSpeed engine of the same ZeRO stage, with all experts on every rank and with its experts in each form that
transformers has for a CPU. Ours starts from its weights, through the import, and the first losses are compared. It has
a vision encoder too, which sees one cell, and its step counts, reduces and keeps what is logged, as in a training.
Engines take turns; ratios are of the same turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from train_step import parse, plan_of, report, setting
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dsmoe_vl.command import leave
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.batch import Batch
from dsmoe_vl.data.pack import assemble, collate
from dsmoe_vl.data.pack_shape import PackShape
from dsmoe_vl.data.segment import IGNORE, Modality, Segment
from dsmoe_vl.parallel.device import use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.pretrained.importing import import_models

_LENGTH = 96  # tokens of a text
_AGREEMENT = 1e-4  # of the first losses, nats a token
FORMS = ("grouped_mm", "eager")


def peer_config(recipe: Recipe, form: str) -> Qwen3MoeConfig:
    """The decoder of a recipe as transformers describes it."""
    model, moe = recipe.model, recipe.moe
    return Qwen3MoeConfig(
        vocab_size=recipe.tokenizer.vocab_size, hidden_size=model.width, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.width // model.heads,
        intermediate_size=model.ffn_width, moe_intermediate_size=moe.ffn_width, num_experts=moe.experts,
        num_experts_per_tok=moe.top_k, norm_topk_prob=True, mlp_only_layers=list(range(moe.first_dense_layers)),
        tie_word_embeddings=True, rope_theta=model.rope_base, rms_norm_eps=model.norm_eps, output_router_logits=True,
        router_aux_loss_coef=moe.balance_weight, max_position_embeddings=_LENGTH, use_cache=False,
        experts_implementation=form, attn_implementation="sdpa",
    )  # fmt: skip


def batch_of(plan: RunPlan, ids: np.ndarray) -> Batch:
    """Texts int [texts, length] as packs."""
    shape, labels = PackShape.of(plan.recipe), np.full(ids.shape, IGNORE, np.int32)
    labels[:, :-1] = ids[:, 1:]
    segments = [
        Segment(task_number("caption"), text, wanted, np.full_like(text, Modality.TEXT))
        for text, wanted in zip(ids, labels, strict=True)
    ]
    a_pack = shape.length // _LENGTH
    return collate([assemble(segments[at : at + a_pack], shape) for at in range(0, len(segments), a_pack)])


class Ours:
    """A step as `training/` takes it."""

    def __init__(self, plan: RunPlan, ranks: Ranks, device: torch.device) -> None:
        from dsmoe_vl.parallel.process_group import HostGroup
        from dsmoe_vl.tasks.caption import CaptionTask
        from dsmoe_vl.training.engine import build_engine
        from dsmoe_vl.training.step import OptimizerStep

        engine = build_engine(plan, ranks, (CaptionTask.__new__(CaptionTask),))  # its loss needs no tokenizer
        self.plan, self.step = plan, OptimizerStep(plan, ranks, engine, HostGroup(), device)

    def take(self, ids: np.ndarray) -> float:
        """The loss, nats a token, over all ranks."""
        shared = self.step.share([batch_of(self.plan, ids)])
        return float(self.step(shared.batches, shared.counts).terms["loss_caption"])


class Theirs:
    """A DeepSpeed engine around transformers' model."""

    def __init__(self, plan: RunPlan, folder: Path, form: str, device: torch.device) -> None:
        model: Any = Qwen3MoeForCausalLM.from_pretrained(folder, config=peer_config(plan.recipe, form))
        parameters = dict(plan.deepspeed["optimizer"]["params"])
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **parameters)
        ours = ("optimizer", "scheduler", "expert_parallel", "activation_checkpointing")
        config = {key: value for key, value in plan.deepspeed.items() if key not in ours}
        self.engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.device = device

    def take(self, ids: np.ndarray) -> float:
        """As `Ours.take`, of this rank."""
        tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        out = self.engine(input_ids=tokens, labels=tokens)
        self.engine.backward(out.loss)
        self.engine.step()
        return float((out.loss - self.engine.module.config.router_aux_loss_coef * out.aux_loss).detach())


def imported(recipe_file: Path, overrides: list[str], ranks: Ranks) -> tuple[Recipe, Path]:
    """The recipe over the weights of a random model of transformers, which rank 0 writes and imports."""
    folder = [tempfile.mkdtemp()] if ranks.rank == 0 else [""]
    if ranks.rank == 0:
        torch.manual_seed(0)
        plain = load_recipe(recipe_file, overrides)
        Qwen3MoeForCausalLM(peer_config(plain, "eager")).save_pretrained(Path(folder[0]) / "theirs")
        import_models(Path(folder[0]) / "theirs", None, Path(folder[0]) / "ours")
    dist.broadcast_object_list(folder)
    recipe = load_recipe(recipe_file, [*overrides, f"model.init_from={folder[0]}/ours"])
    return recipe, Path(folder[0])


def main() -> int:
    """Compare the first losses, then the times."""
    from dsmoe_vl.parallel.process_group import start_process_group

    args, ranks = parse(__doc__), Ranks.discover()
    torch.set_num_threads(1)
    plain = plan_of(load_recipe(args.recipe, args.overrides), args, ranks)
    device = use_device(plain.device, ranks)
    start_process_group(ranks, plain.device)
    recipe, folder = imported(args.recipe, args.overrides, ranks)
    plan = plan_of(recipe, args, ranks)
    engines: dict[str, Any] = {"ours": Ours(plan, ranks, device)}
    engines |= {form: Theirs(plan, folder / "theirs", form, device) for form in FORMS}
    texts = plan.micro_batch * (recipe.data.pack_length // _LENGTH)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, float] = {}
    for index in range(args.steps + 2):
        noise = np.random.default_rng((index, ranks.rank))
        ids = noise.integers(0, recipe.tokenizer.vocab_size, (texts, _LENGTH)).astype(np.int32)
        for name, engine in engines.items():
            dist.barrier()
            started = time.perf_counter()
            loss = engine.take(ids)
            taken = time.perf_counter() - started
            if index >= 2:
                seconds[name].append(taken)
            elif index == 0:
                losses[name] = loss
    mean = torch.tensor([losses[form] for form in FORMS], dtype=torch.float64)
    dist.all_reduce(mean)
    for form, loss in zip(FORMS, (mean / ranks.world_size).tolist(), strict=True):
        if abs(loss - losses["ours"]) > _AGREEMENT:
            raise SystemExit(f"{form}: a first loss of {loss:.6f}, ours is {losses['ours']:.6f}: not the same work")
    fastest = min(FORMS, key=lambda form: statistics.median(seconds[form]))
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[fastest], strict=True)]
    tokens = ranks.world_size * texts * _LENGTH
    report("train_peer", {
        **setting(plan), "steps": args.steps, "form": fastest, "first_loss": losses["ours"],
        "tokens_per_second": {
            "ours": tokens / statistics.median(seconds["ours"]),
            "transformers": tokens / statistics.median(seconds[fastest]),
        },
        "ours_over_transformers": [statistics.median(ratios), min(ratios), max(ratios)],
    }, ranks, args)  # fmt: skip
    return 0


if __name__ == "__main__":
    leave(main())
