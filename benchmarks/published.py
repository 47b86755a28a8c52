"""The planner beside published speeds of other trainers. None of them was used to choose a constant.

    python benchmarks/published.py [--json FILE]                                          (a second, no GPU)

The planner knows data and expert parallelism. Where a point also has tensor parallelism (`tp`) or a pipeline (`pp`), a
GPU gets the same share of the work, and this file adds what these two are known to cost: collectives in attention
(Korthikanti et al. 2022, section 4.2.2) and the pipeline's bubble (Narayanan et al. 2021, section 2.2.1).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import ROOT, Result

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.model import ModelConfig, MoEConfig, VisionConfig
from dsmoe_vl.config.recipe import DataConfig, Recipe, SourceConfig, TokenizerConfig
from dsmoe_vl.planner.cluster import Cluster, cluster_of
from dsmoe_vl.planner.communication import Group, gather
from dsmoe_vl.planner.flops import estimate_flops
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.products import Shape
from dsmoe_vl.planner.resolve import resolve
from dsmoe_vl.planner.step_time import step_time

_FOLDING = "Liu et al. 2025 (arXiv 2504.14960), tables 1 and 3: capacity factor 1, 256 sequences of 4,096 a step"
_BRIDGE = "Megatron-Bridge (067f987), examples/model_verification_cards/qwen3.6-35b-a3b/card.yaml"


@dataclass(frozen=True)
class Point:
    """A published speed, in TFLOP/s of model FLOPs a GPU."""

    name: str
    source: str
    published: float
    recipe: Recipe
    gpus: int
    sequence: int  # tokens
    sequences: int  # of a step, over all GPUs
    micro_batch: int = 1
    ep: int = 1
    tp: int = 1
    pp: int = 1
    stage: int = 1
    recomputed: float = 0.0  # share of the decoder layers
    patches: int = 0  # of a sequence
    real_routing: bool = False
    fp8: bool = False
    remark: str = ""  # what the planner leaves out of it


def _language(
    layers: int, width: int, heads: int, kv_heads: int, vocab: int, head_width: int = 0, dense_ffn_width: int = 8,
    vision: VisionConfig | None = None, **moe: Any,
) -> Recipe:  # fmt: skip
    """A recipe of these shapes; without experts all layers are dense. Where no encoder is used there is a tiny one."""
    vision = vision or VisionConfig(width=8, layers=1, heads=1, ffn_width=8)
    model = ModelConfig(
        width=width, layers=layers, heads=heads, kv_heads=kv_heads, head_width=head_width, ffn_width=dense_ffn_width,
        tied=False, vision=vision,
    )  # fmt: skip
    experts = MoEConfig(**{"first_dense_layers": 0 if moe else layers, **moe})
    tokenizer = TokenizerConfig(path="tokenizer.json", vocab_size=vocab)
    return Recipe(model=model, moe=experts, tokenizer=tokenizer)


MIXTRAL = _language(56, 6144, 48, 8, 32768, experts=8, top_k=2, ffn_width=16384)
QWEN2 = _language(28, 3584, 28, 4, 151936, experts=64, top_k=8, ffn_width=2560, shared_ffn_width=20480)
QWEN3 = _language(48, 2048, 32, 4, 151936, 128, experts=128, top_k=8, ffn_width=768)
# Three of four layers are Gated DeltaNet, which we do not have: attention with as many parameters stands for them.
QWEN36 = _language(
    40, 2048, 32, 32, 248320, 128, experts=256, top_k=8, ffn_width=512, shared_ffn_width=512,
    vision=VisionConfig(patch_size=16, width=1152, layers=27, heads=16, ffn_width=4304, ffn="gelu_tanh"),
)  # fmt: skip
LLAMA3 = _language(32, 4096, 32, 8, 128256, dense_ffn_width=14336)

_FUSED = "fused norms, rotations and gates; our operators one by one"
POINTS = (
    Point("Mixtral 8x22B, TP 2 EP 8 PP 8", _FOLDING, 487.8, MIXTRAL, 128, 4096, 256, ep=8, tp=2, pp=8,
          remark=f"an interleaved pipeline, whose stages a GPU the paper does not give; {_FUSED}"),
    Point("Qwen2-57B-A14B, TP 2 EP 4 PP 4", _FOLDING, 385.9, QWEN2, 64, 4096, 256, ep=4, tp=2, pp=4,
          remark=f"the same; {_FUSED}"),
    Point("Mixtral 8x22B, FSDP + EP 8, TP 2", _FOLDING, 231.5, MIXTRAL, 128, 4096, 256, ep=8, tp=2, stage=3,
          recomputed=1.0, remark="whether layers are recomputed is not said; here they are"),
    Point("Qwen2-57B-A14B, FSDP + EP 8", _FOLDING, 251.3, QWEN2, 64, 4096, 256, ep=8, stage=3,
          recomputed=1.0, remark="whether layers are recomputed is not said; here they are"),
    Point("Qwen3-30B-A3B, FSDP, EP 8", "NeMo Automodel (01926a5), docs/performance-summary.md", 277.0, QWEN3, 8, 4096,
          512, micro_batch=4, ep=8, stage=3, recomputed=1.0, remark=f"what DeepEP overlaps; {_FUSED}"),
    Point("Qwen3.6-35B-A3B, EP 8 PP 2, real routing", _BRIDGE, 135.6, QWEN36, 16, 4096, 512, ep=8, pp=2, patches=784,
          real_routing=True, remark="Gated DeltaNet in three of four layers; how uneven its routing was"),
    Point("Qwen3.6-35B-A3B, EP 8 PP 2, balanced", _BRIDGE, 185.15, QWEN36, 16, 4096, 512, ep=8, pp=2, patches=784,
          remark="Gated DeltaNet in three of four layers"),
    Point("Llama 3 8B, FSDP, FP8", "Megatron-Bridge (00b7660), docs/performance-summary.md", 744.0, LLAMA3, 8, 8192,
          128, stage=3, recomputed=5 / 32, fp8=True, remark=f"casts to FP8, attention by cuDNN; {_FUSED}"),
)  # fmt: skip


def plan_of(point: Point) -> RunPlan:
    """The point for the planner. With tensor parallelism a GPU works on its part of each sequence's tokens."""
    length = point.sequence // point.tp
    recipe = replace(
        point.recipe,
        data=DataConfig(
            sources=(SourceConfig.at("text"),), lanes=point.gpus, pack_length=length,
            pack_patches=max(point.patches, 4), image_max_patches=max(point.patches, 4), frame_max_patches=4,
            video_frames=1, workers=1,
        ),
    )  # fmt: skip
    deepspeed = load_deepspeed(ROOT / "ds_configs/moe.json") | {
        "train_micro_batch_size_per_gpu": point.micro_batch,
        "gradient_accumulation_steps": point.sequences * point.tp // point.gpus // point.micro_batch,
        "zero_optimization": {"stage": point.stage, "overlap_comm": True},
        "expert_parallel": {"enabled": True, "autoep_size": point.ep},
    }
    plan = resolve(recipe, deepspeed, point.gpus, device="cuda", bf16_unit=True, strict=True)
    return replace(plan, flops=estimate_flops(recipe, token_context=point.sequence / 2))


def predicted(point: Point, cluster: Cluster) -> float:
    """TFLOP/s of model FLOPs a GPU."""
    plan = plan_of(point)
    if point.fp8:
        # 1402.6 of 1979 TFLOP/s: ml-engineering (744d01e), compute/accelerator. Attention stays in bf16.
        cluster = replace(cluster, peak_flops=1979e12, product_share=0.709, attention_share=0.35 / 2)
    tokens = plan.micro_batch * plan.recipe.data.pack_length
    shape = Shape(tokens, plan.micro_batch * point.patches, tokens, point.ep)
    busiest = None if point.real_routing else 0.0
    kept, again = (
        step_time(replace(plan, recompute=recompute), cluster, busiest, shape) for recompute in ("none", "decoder")
    )
    total = kept.total - kept.data + point.recomputed * (again.total - again.data - kept.total + kept.data)
    if point.pp > 1:  # stages share the weights: a GPU has a part of what the planner counts, hidden by the overlap
        total -= kept.zero
        micro_batches = point.sequences * point.pp * point.tp // point.gpus // point.micro_batch
        total *= 1 + (point.pp - 1) / micro_batches
    if point.tp > 1:  # gather and scatter around attention, forward, backward, and once more for the weights' gradient
        sent = 5 * gather(2.0 * tokens * point.tp * plan.recipe.model.width, Group(point.tp, point.tp), cluster)
        total += plan.accumulation * plan.recipe.model.layers * sent
    flops = plan.accumulation * plan.flops.training(tokens, plan.micro_batch * point.patches, tokens)
    return flops / total / 1e12


def figures() -> dict[str, Any]:
    """Published and predicted speeds, and what is known of each point."""
    cluster = cluster_of("h100")
    found = {}
    for point in POINTS:
        ours = predicted(point, cluster)
        found[point.name] = {
            "gpus": point.gpus, "published_tflops": point.published, "predicted_tflops": ours,
            "error": ours / point.published - 1, "source": point.source, "left_out": point.remark,
        }  # fmt: skip
    return found


def main() -> int:
    """Print every point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a result file too (record.py)")
    args = parser.parse_args()
    found = figures()
    for name, point in found.items():
        print(f"{name:44} {point['published_tflops']:6.1f} {point['predicted_tflops']:6.1f} {point['error']:+.0%}")
    if args.json:
        Result.now("published", found).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
