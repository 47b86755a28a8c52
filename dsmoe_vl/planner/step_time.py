"""How long an optimizer step takes on a cluster, part by part.

Products take what they compute or what they move, whichever is longer (Williams et al. 2009, the roofline); other
operators what they move. On a GPU the host starts operators while the device works, so the slower of the two counts.
The exchange of tokens is not hidden. ZeRO's collectives are hidden behind the computation where `overlap_comm` is on,
which is DeepSpeed's default at stage 3 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from dsmoe_vl.config.deepspeed_json import setting
from dsmoe_vl.config.recipe import RECOMPUTED, Recipe
from dsmoe_vl.planner.activations import LOSS_CHUNK
from dsmoe_vl.planner.cluster import Cluster
from dsmoe_vl.planner.communication import (
    all_reduce,
    all_to_all,
    data_group,
    expert_data_group,
    expert_group,
    gather,
)
from dsmoe_vl.planner.parameters import experts_of_layers, sparse_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.products import (
    PATCHES_SPREAD,
    Shape,
    attention_flops,
    exchanged_rows,
    products,
    traffic,
)

# The busiest expert's load over the mean, less one: with a balancing loss, and with the aux-loss-free bias (Wang et al.
# 2024, table 2, the model of 3 B).
_VIOLATION, _VIOLATION_WITH_BIAS = 0.52, 0.04


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; the parts add up."""

    products: float
    attention: float
    memory_traffic: float  # operators without products
    host: float  # starting operators, where that is not hidden
    all_to_all: float
    zero: float  # gathering weights, reducing and scattering gradients, where that is not hidden
    optimizer: float
    expert_imbalance: float  # waiting for the rank with the busiest experts
    pack_imbalance: float  # waiting for the rank with the most patches
    data: float  # waiting for the loader

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, item.name) for item in fields(self))


def violation(recipe: Recipe) -> float:
    """The busiest expert's load over the mean, less one, that routing is expected to have."""
    return _VIOLATION_WITH_BIAS if recipe.moe.bias_rate > 0 else _VIOLATION


def busiest_rank(recipe: Recipe, ep_size: int, busiest_expert: float) -> float:
    """The load of the busiest of `ep_size` ranks over the mean, less one; `busiest_expert`: the same of experts.

    Loads of E experts scatter independently, so their largest is sqrt(2 ln E) deviations above the mean; a rank has the
    mean of E / ep_size of them, which deviates less, and there are fewer ranks than experts.
    """
    experts = max(recipe.moe.experts, 2)
    if ep_size == 1 or not sparse_layers(recipe):
        return 0.0
    return busiest_expert * math.sqrt(math.log(ep_size) / math.log(experts) * ep_size / experts)


def step_time(
    plan: RunPlan, cluster: Cluster, busiest_expert: float | None = None, shape: Shape | None = None
) -> StepTime:
    """The time with micro-steps of a shape, the same on all ranks, by default of `Shape.typical`, which differ between
    ranks. `busiest_expert`: as in `busiest_rank`; 0 for routing that is balanced by force."""
    recipe = plan.recipe
    waiting = 0.0
    if shape is None:
        shape = Shape.typical(recipe, plan.micro_batch, plan.ep_size)
        waiting = _of_micro_step(plan, cluster, _fullest(plan, shape)).total
    own = _of_micro_step(plan, cluster, shape)
    waiting = max(0.0, waiting - own.total)
    exchange = _exchange(plan, cluster)
    if busiest_expert is None:
        busiest_expert = violation(recipe)
    late = busiest_rank(recipe, plan.ep_size, busiest_expert) * (own.experts + exchange)
    times = plan.accumulation
    return StepTime(
        products=times * own.products,
        attention=times * own.attention,
        memory_traffic=times * own.memory_traffic,
        host=times * own.host,
        all_to_all=times * exchange,
        zero=_zero(plan, cluster, own.total),
        optimizer=_optimizer(plan, cluster),
        expert_imbalance=times * late,
        pack_imbalance=times * waiting,
        data=times * _data_wait(plan, cluster, shape, own.total + exchange + late + waiting),
    )


@dataclass(frozen=True)
class _MicroStep:
    """Seconds of one rank's forward and backward pass, without communication."""

    products: float
    experts: float  # of `products`
    attention: float
    memory_traffic: float
    host: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory_traffic + self.host


def _of_micro_step(plan: RunPlan, cluster: Cluster, shape: Shape) -> _MicroStep:
    recipe, cuda, element = plan.recipe, cluster.device == "cuda", _element(plan)
    of_part = dict.fromkeys(("vision", "decoder", "experts", "head"), 0.0)
    for product in products(recipe, shape):
        compute = product.flops / cluster.product_rate
        of_part[product.part] += max(compute, product.times * product.moved(element) / cluster.memory_rate)
    if recipe.moe.backend == "capacity" and recipe.moe.drop_tokens:
        of_part["experts"] *= recipe.moe.capacity_factor  # rows are padded to the limit
    backward = _backward(plan)
    again = RECOMPUTED[plan.recompute] + (("head",) if shape.labels > LOSS_CHUNK else ())
    work = {part: seconds * (1 + backward + (part in again)) for part, seconds in of_part.items()}
    # The backward kernel of attention makes the scores anew: five products for the two of the forward pass.
    attended_again = replace(
        shape, patches=shape.patches * ("vision" in again), tokens=shape.tokens * ("decoder" in again)
    )
    computed = 3.5 * attention_flops(recipe, shape, plan.flops) + attention_flops(recipe, attended_again, plan.flops)
    attention = computed / (cluster.peak_flops * cluster.attention_share)
    moved, moved_again = traffic(recipe, shape, cuda), traffic(recipe, shape, cuda, RECOMPUTED[plan.recompute])
    elements, numbers, operators = (
        3 * getattr(moved, name) + getattr(moved_again, name) for name in ("elements", "numbers", "operators")
    )
    memory_traffic = (elements * element + numbers * 4) / cluster.memory_rate
    device = sum(work.values()) + attention + memory_traffic
    host = operators * cluster.operator_seconds
    host = max(0.0, host - device) if cuda else host
    return _MicroStep(sum(work.values()), work["experts"], attention, memory_traffic, host)


def _fullest(plan: RunPlan, shape: Shape) -> Shape:
    """The shape of the rank for which the others wait: the largest number of patches of as many ranks as wait for each
    other, up to a full pack's. Up to ZeRO-1 that is a group of experts in a micro-step, and all ranks in a step."""

    def above(ranks: int, packs: int) -> float:
        return PATCHES_SPREAD * math.sqrt(2 * math.log(ranks) / packs)

    packs = plan.micro_batch
    if plan.zero_stage >= 2:
        excess = above(plan.world_size, packs)
    else:
        excess = max(above(plan.ep_size, packs), above(plan.world_size, packs * plan.accumulation))
    full = plan.micro_batch * plan.recipe.data.pack_patches
    return replace(shape, patches=min(full, round(shape.patches * (1 + excess))))


def _element(plan: RunPlan) -> int:
    """Bytes of a weight, an activation and a gradient."""
    return 2 if plan.precision == "bf16" else 4


def _backward(plan: RunPlan) -> float:
    """Products of the backward pass over those of the forward pass; two, less what frozen weights spare."""
    data, flops = plan.recipe.data, plan.flops
    forward = data.pack_length * flops.per_token + data.pack_patches * flops.per_patch
    spared = data.pack_length * flops.spared_token + data.pack_patches * flops.spared_patch
    return 2 - spared / forward


def _exchange(plan: RunPlan, cluster: Cluster) -> float:
    """Every sparse layer's all-to-all, to the experts and back, forward and backward, and once more to recompute."""
    if plan.ep_size == 1:
        return 0.0
    recipe = plan.recipe
    tokens, row = plan.micro_batch * recipe.data.pack_length, recipe.model.width * _element(plan)
    times, group = 4 + 2 * (plan.recompute != "none"), expert_group(plan.ep_size, cluster)
    return times * sum(
        all_to_all(tokens * exchanged_rows(recipe.moe, experts, plan.ep_size) * row, group, cluster)
        for experts in experts_of_layers(recipe)
    )


def _zero(plan: RunPlan, cluster: Cluster, computing: float) -> float:
    """ZeRO's collectives of a step; `computing`: of one micro-step, which hides them where they overlap."""
    element = _element(plan)
    groups = (
        data_group(plan.world_size, cluster),
        expert_data_group(plan.world_size, plan.ep_size, cluster),
    )
    trained_experts = plan.trained.trained.get("experts", 0)
    held = (plan.parameters.total - plan.parameters.experts, plan.parameters.experts / plan.ep_size)
    trained = (plan.trained.total - trained_experts, trained_experts / plan.ep_size)

    # Up to stage 2 buckets are large; stage 3 gathers layer by layer.
    messages = 1 if plan.zero_stage < 3 else plan.recipe.model.layers + plan.recipe.model.vision.layers

    def once(numbers: tuple[float, float]) -> float:
        return sum(gather(n * element, group, cluster, messages) for n, group in zip(numbers, groups, strict=True))

    steps, stage = plan.accumulation, plan.zero_stage
    if stage == 0:
        return sum(all_reduce(n * element, group, cluster) for n, group in zip(trained, groups, strict=True))
    if stage < 3:
        reducing = once(trained) * (steps if stage == 2 else 1)
        if setting(plan.deepspeed, "zero_optimization.overlap_comm", False):
            reducing = max(0.0, reducing - computing * (steps if stage == 2 else 1) * 2 / 3)
        return reducing + once(trained)
    gathers = 2 + (plan.recompute != "none")
    every = gathers * once(held) + once(trained)
    if setting(plan.deepspeed, "zero_optimization.offload_param.device", "none") == "cpu":
        every += gathers * element * plan.parameters.total / plan.world_size / cluster.host_bandwidth
    if setting(plan.deepspeed, "zero_optimization.overlap_comm", True):
        every = max(0.0, every - computing)
    return steps * every


def _optimizer(plan: RunPlan, cluster: Cluster) -> float:
    """AdamW on this rank's share: reads gradient, weight and two moments and writes all but the gradient, in fp32."""
    element, own = _element(plan), plan.trained.total / plan.world_size
    if plan.zero_stage == 0:
        experts = plan.trained.trained.get("experts", 0)
        own = plan.trained.total - experts + experts / plan.ep_size
    moved = own * (28 + 2 * element + 4)  # and the gradient's norm, and the weight in the model's precision
    if setting(plan.deepspeed, "zero_optimization.offload_optimizer.device", "none") == "cpu":
        of_rank = cluster.host_memory_bandwidth / cluster.accelerators
        return moved / of_rank + 2 * own * element / cluster.host_bandwidth
    return moved / cluster.memory_rate


def _data_wait(plan: RunPlan, cluster: Cluster, shape: Shape, micro_step: float) -> float:
    """What a micro-step waits for its patches: decoding goes on meanwhile in the loader's processes."""
    workers = plan.recipe.data.workers
    decoding = shape.patches / (max(workers, 1) * cluster.patches_per_second)
    return decoding if workers == 0 else max(0.0, decoding - micro_step)
