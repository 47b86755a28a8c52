"""Memory of weights, gradients and optimizer states on one rank (Rajbhandari et al. 2020, section 3.1).

Bytes per parameter with AdamW in mixed precision: 2 for the weight, 2 for the gradient, 12 for the fp32 master weight
and two moments. In fp32: 4, 4, and 12 with ZeRO (its partitions are copies) or 8 without. Activations and communication
buckets are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.planner.parameters import ParameterCounts


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
    *,
    zero_stage: int,
    world_size: int,
    ep_size: int,
    bf16: bool,
    offload_optimizer: bool,
    offload_param: bool,
) -> MemoryEstimate:
    """Average per rank: dense parts are sharded over all ranks, experts over EP groups and then their replicas."""
    held = (parameters.total - parameters.experts) + parameters.experts / ep_size
    # Dense parts are spread over world_size ranks; 1 / ep_size of the experts over the world_size / ep_size replicas.
    partition = parameters.total / world_size
    weight_bytes = 2 if bf16 else 4
    state_bytes = 12 if bf16 or zero_stage >= 1 else 8
    weights = weight_bytes * (partition if zero_stage >= 3 else held)
    gradients = weight_bytes * (partition if zero_stage >= 2 else held)
    optimizer = state_bytes * (partition if zero_stage >= 1 else held)
    host = 0.0
    if offload_optimizer:
        host += optimizer + 4 * partition  # fp32 gradients of the partition are offloaded too
        optimizer = 0.0
        gradients = 0.0 if zero_stage >= 2 else gradients
    if offload_param:
        host += weights
        weights = 0.0
    return MemoryEstimate(weights, gradients, optimizer, host)
