"""The position of the data stream in a checkpoint.

    {"order": `order_identity`, "packs": packs consumed by all ranks, "lanes": {lane: its state},
     "epochs": {source: its newest epoch}, "contents": {source: `ShardIndex.contents`}}

The state of a rank has the lanes and epochs that it reads. A checkpoint has the states of all ranks; any number of
ranks can continue from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dsmoe_vl.data.error_log import newest_epochs
from dsmoe_vl.data.shards.index import ShardIndex
from dsmoe_vl.errors import CheckpointError

_NONE: Mapping[str, str] = MappingProxyType({})


def order_identity(
    lanes: int, shuffle_block: int, seed: int, indexes: dict[str, ShardIndex], maps: Mapping[str, str] = _NONE
) -> dict[str, Any]:
    """Everything that the order of samples depends on, as JSON.

    By source name: `indexes`, and in `maps` the hash of its transformation, if it has one.
    """
    return {
        "data.lanes": lanes,
        "data.shuffle_block": shuffle_block,
        "run.seed": seed,
        "data.sources": [
            [name, index.fingerprint, *([maps[name]] if name in maps else [])] for name, index in indexes.items()
        ],
    }


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks. Raises CheckpointError if they are not of the same step and run."""
    if not states:
        raise CheckpointError("the checkpoint has no data state; load an older checkpoint")
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
    epochs = newest_epochs(state.get("epochs", {}) for state in states)  # missing in older checkpoints
    contents = first.get("contents", {})  # missing in older checkpoints
    return {"order": first["order"], "packs": first["packs"], "lanes": lanes, "epochs": epochs, "contents": contents}


def check_order(state: dict[str, Any], order: dict[str, Any]) -> None:
    """Raise CheckpointError if a stream of this `order` would lose or repeat samples when it continues `state`."""
    for name, value in order.items():
        before = state["order"].get(name)
        if before != value:
            raise CheckpointError(
                f"{name} was {before} when the checkpoint was written and is {value} now, which changes the order of "
                "the data; restore it, or start a new run"
            )


def contents_of_sources(indexes: Mapping[str, ShardIndex]) -> dict[str, str]:
    """By source name, what is in the shards, for `changed_contents`."""
    return {name: index.contents for name, index in indexes.items()}


def changed_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A message for each source whose shards were written anew with the same names, counts and sizes: the order of the
    data is the same, the data are not. What was not known then, or is not known now, is no change."""
    return [
        f"data.sources, {name}: its shards have other {'bytes' if kind == 'sha256' else 'texts'} than when the "
        "checkpoint was written, with the same names and sizes; training goes on with those that are there now"
        for name, now_has in now.items()
        for kind in [now_has.partition(" ")[0]]
        if (had := before.get(name, "")).partition(" ")[0] == kind and had != now_has
    ]
