"""Time of collectives on two levels of network: inside a node, and between nodes (Thakur et al. 2005).

Both levels work at once, so a collective takes as long as its slower level. Every rank of a node has a network adapter
of its own; a ring through several ranks of a node uses the adapters of all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsmoe_vl.planner.cluster import Cluster


@dataclass(frozen=True)
class Group:
    """Ranks that communicate; `inside`: how many of them are in one node."""

    size: int
    inside: int

    @property
    def nodes(self) -> int:
        """Over how many nodes it is spread."""
        return math.ceil(self.size / self.inside)


def data_group(world_size: int, cluster: Cluster) -> Group:
    """All ranks."""
    return Group(world_size, min(world_size, cluster.accelerators))


def expert_group(ep_size: int, cluster: Cluster) -> Group:
    """Consecutive ranks that have every expert once."""
    return Group(ep_size, math.gcd(ep_size, cluster.accelerators))


def expert_data_group(world_size: int, ep_size: int, cluster: Cluster) -> Group:
    """The ranks that have the same experts: every `ep_size`-th."""
    size = world_size // ep_size
    return Group(size, max(1, min(size, min(world_size, cluster.accelerators) // ep_size)))


def all_to_all(own_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds until each rank's `own_bytes`, an equal part for every rank, have arrived; pairwise exchange."""
    near, far = group.inside - 1, group.size - group.inside
    inside = own_bytes * near / group.size / cluster.link_rate + near * cluster.link_latency
    between = own_bytes * far / group.size / cluster.network_rate + min(far, 1) * cluster.network_latency
    return max(inside, between)


def gather(whole_bytes: float, group: Group, cluster: Cluster, messages: int = 1) -> float:
    """Seconds to bring together what is spread over a group, `whole_bytes` for every rank, or to reduce and scatter.
    `messages`: in so many collectives, one after the other."""
    if group.size == 1:
        return 0.0
    inside = whole_bytes * (group.size - 1) / group.size / cluster.link_rate if group.inside > 1 else 0.0
    steps = messages * math.ceil(math.log2(group.size))
    if group.nodes == 1:
        return inside + steps * cluster.link_latency
    between = whole_bytes * (group.nodes - 1) / group.nodes / (group.inside * cluster.network_rate)
    return max(inside, between) + steps * cluster.network_latency


def all_reduce(whole_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds to sum `whole_bytes` over a group: reduce and scatter, then gather."""
    return 2 * gather(whole_bytes, group, cluster)
