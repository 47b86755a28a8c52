"""All memory of one rank at its peak, and of its host. `memory.py` has weights, gradients and optimizer states."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from dsmoe_vl.config.deepspeed_json import setting
from dsmoe_vl.planner.activations import activations
from dsmoe_vl.planner.cluster import Cluster
from dsmoe_vl.planner.memory import memory_for
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.products import Shape, exchanged_rows

_BUCKET, _PREFETCH, _SUB_GROUP = 5e8, 5e7, 1e9  # numbers; DeepSpeed's defaults
_CHECKPOINT_BYTES = 12  # of a trained parameter: fp32 weight and two moments


@dataclass(frozen=True)
class RunMemory:
    """Bytes; all but the last two on the device of one rank."""

    reserved: float  # by the process, before it has a model
    weights: float
    gradients: float
    optimizer: float
    activations: float  # and their gradients in one layer; with that layer's again, if it is recomputed
    logits: float  # beyond what that one layer has, which comes after them
    buffers: float  # of collectives, and parameters that ZeRO-3 has gathered
    fragmentation: float
    host_states: float  # offloaded, of one rank in its host
    host_snapshot: float  # of a save in the background, likewise

    @property
    def states(self) -> float:
        """What stays from step to step."""
        return self.reserved + self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> float:
        """At the peak."""
        return sum(getattr(self, item.name) for item in fields(self) if not item.name.startswith("host"))

    def fits(self, cluster: Cluster) -> bool:
        """Whether accelerators and hosts have room."""
        host = (self.host_states + self.host_snapshot) * cluster.accelerators
        return self.device <= cluster.memory_bytes and host <= cluster.host_memory_bytes


def run_memory(plan: RunPlan, cluster: Cluster, shape: Shape | None = None) -> RunMemory:
    """For micro-steps of a shape, by default of packs that are full of patches and have a label at every token. A
    snapshot that does not fit makes saves wait; it is not needed to train."""
    bf16, cuda = plan.precision == "bf16", cluster.device == "cuda"
    states = memory_for(plan.deepspeed, plan.parameters, plan.trained, plan.world_size, plan.ep_size, bf16)
    if shape is None:
        shape = Shape.full(plan.recipe, plan.micro_batch, plan.ep_size)
        shape = replace(shape, labels=shape.tokens)
    kept = activations(plan.recipe, shape, bf16=bf16, cuda=cuda, recompute=plan.recompute)
    buffers = _buffers(plan, cuda) + (0.0 if cuda else _flat_gradients(plan))
    peak = kept.total
    return RunMemory(
        reserved=cluster.reserved_bytes,
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=kept.kept + kept.recomputed + kept.gradients,
        logits=peak - kept.kept - kept.recomputed - kept.gradients,
        buffers=buffers,
        fragmentation=cluster.fragmentation * (peak + buffers),
        host_states=states.host,
        host_snapshot=checkpoint_bytes(plan) / plan.world_size,
    )


def checkpoint_bytes(plan: RunPlan) -> float:
    """Of one checkpoint: the weights in the plan's precision, and the optimizer's state of what trains."""
    weight = 2 if plan.precision == "bf16" else 4
    return weight * plan.parameters.total + _CHECKPOINT_BYTES * plan.trained.total


def _flat_gradients(plan: RunPlan) -> float:
    """Gradients in one piece: as ZeRO's update reads them, or as DeepSpeed without ZeRO adds them up over ranks, the
    experts' apart. Activations are gone by then: on a GPU it takes their memory, but a CPU's allocator has kept that of
    many small pieces."""
    if plan.zero_stage == 0:
        experts = plan.trained.trained.get("experts", 0)
        element = 2 if plan.precision == "bf16" else 4
        return element * min(max(plan.trained.total - experts, experts / plan.ep_size), _BUCKET)
    own = plan.trained.total / plan.world_size
    group = setting(plan.deepspeed, "zero_optimization.sub_group_size", _SUB_GROUP)
    return 4 * (min(own, group) if plan.zero_stage == 3 else own)


def reduce_bucket_size(plan: RunPlan) -> int:
    """Numbers in a bucket of gradients: the JSON's, or DeepSpeed's default, but no more than there are parameters."""
    return int(setting(plan.deepspeed, "zero_optimization.reduce_bucket_size", min(_BUCKET, plan.parameters.total)))


def _buffers(plan: RunPlan, cuda: bool) -> float:
    """The exchange's rows out and in, ZeRO's buckets and ZeRO-3's gathered parameters."""
    element = 2 if plan.precision == "bf16" else 4
    recipe, parameters = plan.recipe, plan.parameters
    tokens, row = plan.micro_batch * recipe.data.pack_length, recipe.model.width * element
    of_layers = (exchanged_rows(recipe.moe, experts, plan.ep_size) for experts in experts_of_layers(recipe))
    exchange = 2 * tokens * row * max(of_layers, default=0.0)
    held = parameters.total - parameters.experts + parameters.experts / plan.ep_size
    if plan.zero_stage == 0:
        return exchange
    bucket = reduce_bucket_size(plan)
    overlap = setting(plan.deepspeed, "zero_optimization.overlap_comm", plan.zero_stage == 3)
    # Memory that nothing has written to is not resident on a CPU.
    buckets = (bucket if cuda else min(bucket, held)) * (1 + overlap * (plan.zero_stage < 3))
    if plan.zero_stage == 3:
        layer = held / max(recipe.model.layers, 1)
        live = setting(plan.deepspeed, "zero_optimization.stage3_max_live_parameters", 1e9)
        prefetch = setting(plan.deepspeed, "zero_optimization.stage3_prefetch_bucket_size", _PREFETCH)
        buckets += min(2 * layer + prefetch, held, live)
    return exchange + buckets * element
