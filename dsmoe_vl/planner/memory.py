"""Memory of weights, gradients and optimizer states on one rank (Rajbhandari et al. 2020, section 3.1).

Bytes per parameter with AdamW in mixed precision: 2 for the weight, 2 for the gradient, 12 for the fp32 master weight
and two moments. In fp32: 4, 4, and 8, or 12 at ZeRO-1 and 2 (their partitions are copies) and with offloaded states.
Activations and communication buckets are not counted. Frozen parameters have a weight only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsmoe_vl.planner.counts import ParameterCounts
from dsmoe_vl.planner.trained import Trained


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank: the first three on the device, `host` in host memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        """Everything on the device, without activations."""
        return self.weights + self.gradients + self.optimizer


def estimate_memory(
    parameters: ParameterCounts,
    trained: Trained,
    *,
    zero_stage: int,
    world_size: int,
    ep_size: int,
    bf16: bool,
    offload_optimizer: bool,
    offload_param: bool,
) -> MemoryEstimate:
    """Average per rank: dense parts are sharded over all ranks, experts over EP groups and then their replicas."""
    # Dense parts are spread over world_size ranks; 1 / ep_size of the experts over the world_size / ep_size replicas.
    held, partition = _of_rank(parameters.total, parameters.experts, world_size, ep_size)
    updated, own_updates = _of_rank(trained.total, trained.trained.get("experts", 0), world_size, ep_size)
    weight_bytes = 2 if bf16 else 4
    has_masters = bf16 or zero_stage in (1, 2) or (zero_stage == 3 and offload_optimizer)
    state_bytes = 12 if has_masters else 8
    weights = weight_bytes * (partition if zero_stage >= 3 else held)
    gradients = weight_bytes * (own_updates if zero_stage >= 2 else updated)
    optimizer = state_bytes * (own_updates if zero_stage >= 1 else updated)
    host = 0.0
    if offload_optimizer:
        host += optimizer + 4 * own_updates  # fp32 gradients of the partition are offloaded too
        optimizer = 0.0
        gradients = 0.0 if zero_stage >= 2 else gradients
    if offload_param:
        host += weights
        weights = 0.0
    return MemoryEstimate(weights, gradients, optimizer, host)


def memory_for(
    deepspeed: dict[str, Any], parameters: ParameterCounts, trained: Trained, world_size: int, ep_size: int, bf16: bool
) -> MemoryEstimate:
    """The estimate for the ZeRO stage and offloading of a DeepSpeed config."""
    zero = deepspeed.get("zero_optimization", {})
    return estimate_memory(
        parameters,
        trained,
        zero_stage=zero.get("stage", 0),
        world_size=world_size,
        ep_size=ep_size,
        bf16=bf16,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") == "cpu",
        offload_param=zero.get("offload_param", {}).get("device", "none") == "cpu",
    )


def _of_rank(total: int, experts: int, world_size: int, ep_size: int) -> tuple[float, float]:
    """Parameters that a rank keeps without ZeRO, and its average share if they are partitioned."""
    return (total - experts) + experts / ep_size, total / world_size
