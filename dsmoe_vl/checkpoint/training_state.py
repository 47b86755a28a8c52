"""Saving and restoring a run: the engine, the position of the data, the random state and the trainer's state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.checkpoint.store import (
    CHECKPOINTS_NAME,
    DATA_NAME,
    TOKENIZER_NAME,
    TRAINER_NAME,
    Manifest,
    Topology,
    checkpoint_name,
    complete,
)
from dsmoe_vl.checkpoint.weights import save_weights
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import write_json, writing
from dsmoe_vl.optim.values import first_non_finite
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan


def topology_of(plan: RunPlan) -> Topology:
    """The topology of a run."""
    return Topology(plan.world_size, plan.ep_size, plan.zero_stage, plan.precision)


def save(
    plan: RunPlan,
    ranks: Ranks,
    host: HostGroup,
    engine: Any,
    tokenizer: Tokenizer,
    step: int,
    load_fraction: Tensor | None,
    data_state: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` and return its folder. Older ones stay. Collective.

    Raises CheckpointError, before anything is written, if a weight of any rank is not finite.
    Raises OSError, which names the folder or a file, if the disk is full or refuses. What is left is removed by the
    next start, not here: a rank that still writes would report that its files have gone, instead of the cause.
    """
    folder = Path(plan.run_dir) / CHECKPOINTS_NAME / checkpoint_name(step)
    broken = next(filter(None, host.gather(first_non_finite(engine.module))), "")
    if broken:
        raise CheckpointError(
            f"step {step} is not saved: {broken} has values that are not finite. Older checkpoints stay as they are, "
            "and the run continues from the newest one: try a lower optimizer.params.lr, a longer warmup_num_steps and "
            "gradient_clipping = 1.0 in the DeepSpeed JSON"
        )
    with writing(folder):
        if ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted attempt
            folder.mkdir(parents=True)
        host.barrier()
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        save_weights(engine.module, plan.zero_stage, folder)
        rng: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        torch.save(rng, folder / _rng_name(ranks))
        states = host.gather(data_state)  # also a barrier: every rank has written its files
        if ranks.rank == 0:
            load = None if load_fraction is None else load_fraction.tolist()
            write_json(folder / TRAINER_NAME, {"step": step, "load_fraction": load})
            write_json(folder / DATA_NAME, states)
            shutil.copyfile(plan.recipe.tokenizer.path, folder / TOKENIZER_NAME)
            complete(folder, Manifest(step, topology_of(plan), tokenizer.sha256, {}))
        host.barrier()
    return folder


def restore(
    folder: Path, ranks: Ranks, engine: Any, device: torch.device
) -> tuple[int, Tensor | None, list[dict[str, Any]]]:
    """Load the engine and the random state. Returns the step, the load fractions and the data states of all ranks.

    Collective. Raises CheckpointError if DeepSpeed cannot load its files.
    """
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}: remove the folder to resume an older one")
    rng = torch.load(folder / _rng_name(ranks), weights_only=True)
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])
    trainer = json.loads((folder / TRAINER_NAME).read_text())
    load = trainer["load_fraction"]
    fractions = None if load is None else torch.tensor(load, device=device)
    return trainer["step"], fractions, json.loads((folder / DATA_NAME).read_text())


def _rng_name(ranks: Ranks) -> str:
    return f"rng_{ranks.rank:05d}.pt"
