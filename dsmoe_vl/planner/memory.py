"""Memory of weights, gradients and optimizer states on one rank (Rajbhandari et al. 2020, section 3.1).

Mixed precision with AdamW: 2 bytes a weight, 2 a gradient, and 12 for the fp32 master weight and two moments. In fp32:
4 and 4, and 12 under ZeRO (whose partitions are copies), 8 without. Activations and buckets come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsmoe_vl.planner.parameters import ParameterCounts


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank: the first three on its device, `host` in its share of the host's memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        """All that stays on the device, without activations."""
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
    """The even share of one rank: dense parts over all ranks, experts over EP groups and then over their replicas."""
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
        host += optimizer + 4 * partition  # the gradients of the partition follow, as fp32
        optimizer = 0.0
        gradients = 0.0 if zero_stage >= 2 else gradients
    if offload_param:
        host += weights
        weights = 0.0
    return MemoryEstimate(weights, gradients, optimizer, host)
