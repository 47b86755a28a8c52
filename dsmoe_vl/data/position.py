"""The position of the data stream in a checkpoint.

    {"order": what the order is a function of, "packs": packs consumed by all ranks, "lanes": {lane: its state},
     "epochs": {source: the newest that has begun}}

A rank's state holds the lanes and epochs that it reads. A checkpoint holds every rank's, and any number of ranks can
continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsmoe_vl.data.error_log import newest_epochs
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.errors import CheckpointError


def order_identity(lanes: int, shuffle_block: int, seed: int, indexes: dict[str, ShardIndex]) -> dict[str, Any]:
    """Everything that the order of samples depends on, `indexes` by source name; JSON."""
    return {
        "data.lanes": lanes,
        "data.shuffle_block": shuffle_block,
        "run.seed": seed,
        "data.sources": [[name, index.fingerprint] for name, index in indexes.items()],
    }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks at one step as one. Raises CheckpointError where they are not of one step and run."""
    if not states:
        raise CheckpointError("the checkpoint holds no data state; load an older checkpoint")
    first = states[0]
    lanes: dict[str, Any] = {}
    for state in states:
        if (state["packs"], state["order"]) != (first["packs"], first["order"]):
            raise CheckpointError("the data states of the ranks are not of one step; load an older checkpoint")
        if repeated := lanes.keys() & state["lanes"].keys():
            raise CheckpointError(
                f"lanes {sorted(repeated)} occur in the data states of two ranks; merge each rank once"
            )
        lanes |= state["lanes"]
    epochs = newest_epochs(state.get("epochs", {}) for state in states)  # older checkpoints have none
    return {"order": first["order"], "packs": first["packs"], "lanes": lanes, "epochs": epochs}


def check_order(state: dict[str, Any], order: dict[str, Any]) -> None:
    """Raise CheckpointError where the stream of `order` cannot continue `state` without losing or repeating samples."""
    for name, value in order.items():
        before = state["order"].get(name)
        if before != value:
            raise CheckpointError(
                f"{name} was {before} when the checkpoint was written and is {value} now, which changes the order of "
                "the data; restore it, or start a new run"
            )
