"""Saving and restoring a run: weights, the optimizer's state, the position of the data, random and trainer's states.

One thread copies this rank's share to host memory, and another one writes the copies, while training goes on: it waits
for the first one alone, before the next update of the weights. Where the copies do not fit into memory, training waits
for both. When all ranks have written, they meet once, and rank 0 marks the checkpoint as complete.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from dsmoe_vl.checkpoint import optimizer_files
from dsmoe_vl.checkpoint.manifest import Manifest, Topology, entries
from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles, Piece, optimizer_name, own_pieces
from dsmoe_vl.checkpoint.optimizer_state import MASTER, after_loading, frozen, make_moments, ranges
from dsmoe_vl.checkpoint.partitions import HostGroups, host_groups
from dsmoe_vl.checkpoint.store import (
    CHECKPOINTS_NAME,
    DATA_NAME,
    PLAN_NAME,
    TRAINER_NAME,
    checkpoint_name,
    complete,
)
from dsmoe_vl.checkpoint.tensor_files import FileEntry, Share, TensorFiles
from dsmoe_vl.checkpoint.weights import load_buffers, own_weights
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, WeightsFile, shard_name
from dsmoe_vl.checkpoint.writing import copies_of, give_way, side_stream, write_copies, write_shares
from dsmoe_vl.config.recipe import first_step
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.errors import CheckpointError
from dsmoe_vl.files import write_atomically, write_json, writing
from dsmoe_vl.parallel.device import free_host_bytes
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.planner.plan import RunPlan, plan_to_json

STEP_STATE = ("load_fraction", "task_weights")  # of `OptimizerStep`
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")  # of the engine


def topology_of(plan: RunPlan) -> Topology:
    """The topology of a run."""
    return Topology(plan.world_size, plan.ep_size, plan.zero_stage, plan.precision)


class _Written(NamedTuple):
    """What a rank has written, for the index and the manifest."""

    host: str
    files: dict[str, FileEntry]
    weights: list[str]
    pieces: list[Piece]
    data_state: dict[str, Any]
    broken: str | None  # a tensor with a value that is not finite
    failure: BaseException | None


@dataclass
class _Save:
    """A save in flight. `trainer`: what trainer.json will have. `copying` ends with the copies, `writing` with what is
    on disk."""

    folder: Path
    trainer: dict[str, Any]
    data_state: dict[str, Any]
    pieces: list[Piece]
    copying: Future[dict[str, Share]] | None
    writing: Future[dict[str, Any]]


class Saver:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(self, plan: RunPlan, ranks: Ranks, host: HostGroup, tokenizer: Tokenizer, first_step: int = 0) -> None:
        """first_step: the one after which the schedule has begun, 0 unless the run has stages."""
        self._plan, self._ranks, self._host, self._tokenizer = plan, ranks, host, tokenizer
        self._copier = ThreadPoolExecutor(1, "checkpoint_copy")
        self._writer = ThreadPoolExecutor(1, "checkpoint_write", initializer=give_way)
        self._save: _Save | None = None
        self._groups: HostGroups | None = None
        self._has_told = False  # that training waits
        self._first_step = first_step

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint has begun and is not complete yet: the same on all ranks."""
        return self._save is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are not written yet."""
        return self._save is not None and not self._save.writing.done()

    def prepare(self, engine: Any) -> None:
        """Make the groups in which parts of ZeRO-3 come together. Collective."""
        self._groups = host_groups(engine.module, self._host)

    def begin(self, engine: Any, step: int, step_state: dict[str, Any], data_state: dict[str, Any]) -> None:
        """Begin to copy this rank's share and to write it, beside the state of `OptimizerStep`. Collective; no other
        save may be in flight.

        The next update of the weights has to wait for `before_update`. Raises OSError if the folder cannot be made.
        """
        assert self._save is None
        folder = Path(self._plan.run_dir) / CHECKPOINTS_NAME / checkpoint_name(step)
        with writing(folder):
            if self._ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted attempt
                folder.mkdir(parents=True)
            self._host.barrier()
        pieces, state = own_pieces(engine, masters=self._plan.precision != "fp32")
        state["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            state["rng/cuda"] = torch.cuda.get_rng_state()
        schedule = engine.lr_scheduler
        trainer = {
            "step": step,
            **step_state,
            "schedule": None if schedule is None else schedule.state_dict(),
            "first_step": self._first_step,
            "engine": {name: getattr(engine, name) for name in _COUNTERS},
        }
        rank, ranks = self._ranks.rank, self._ranks.world_size
        weights, optimizer = shard_name(rank, ranks), optimizer_name(rank, ranks)
        assert self._groups is not None, "prepare comes before"
        shares = {weights: own_weights(engine.module, self._groups), optimizer: Share.of(state)}
        copying = None
        if self._has_room(sum(share.size for share in shares.values())):
            copying = self._copier.submit(copies_of, shares, side_stream())
            written = self._writer.submit(write_copies, folder, copying, self._groups)
        else:
            if rank == 0 and not self._has_told:
                print("note: copies of a checkpoint do not fit into a host's memory: training waits for it", flush=True)
            self._has_told = True
            written = Future()
            try:
                written.set_result(write_shares(folder, shares))
            except Exception as error:
                written.set_exception(error)
        self._save = _Save(folder, trainer, data_state, pieces, copying, written)

    def before_update(self) -> None:
        """Wait until weights and optimizer state may change. An error in copying is that of the save."""
        if self._save is not None and self._save.copying is not None:
            wait([self._save.copying])

    def _has_room(self, size: int) -> bool:
        """Whether every host can keep copies of `size` bytes a rank, with as much again to spare. Collective."""
        return self._host.max(int(2 * size * self._ranks.local_size > free_host_bytes())) == 0

    def finish(self) -> Path:
        """Wait for all ranks, and mark the checkpoint as complete. Returns its folder. Collective.

        Raises CheckpointError for weights that are not finite and for ranks that do not see each other's files; the
        error of a rank that could not write. Older checkpoints then stay, and training can go on.
        """
        save, self._save = self._save, None
        assert save is not None
        written = self._host.collect(self._written(save))
        failure: BaseException | None = None
        if written is not None:
            failure = next((of_rank.failure for of_rank in written if of_rank.failure is not None), None)
            try:
                failure = failure or self._complete(save, written)
            except OSError as error:
                failure = _named(error, save.folder)
        failure = self._host.from_first(failure)
        if failure is not None:
            if self._ranks.rank == 0:
                shutil.rmtree(save.folder, ignore_errors=True)
            raise failure
        return save.folder

    def _written(self, save: _Save) -> _Written:
        host = socket.gethostname()
        try:
            found = save.writing.result()
        except Exception as error:
            return _Written(host, {}, [], [], {}, None, _named(error, save.folder))
        return _Written(host, found["files"], found["weights"], save.pieces, save.data_state, found["broken"], None)

    def _complete(self, save: _Save, written: list[_Written]) -> BaseException | None:
        """On rank 0: the files of no single rank, and the manifest."""
        folder, ranks = save.folder, self._ranks.world_size
        for rank, of_rank in enumerate(written):
            if of_rank.broken is not None:
                return CheckpointError(
                    f"step {save.trainer['step']} is not saved: {of_rank.broken} has values that are not finite. Older "
                    "checkpoints stay as they are, and the run continues from the newest one: try a lower "
                    "optimizer.params.lr, a longer warmup_num_steps and gradient_clipping = 1.0 in the DeepSpeed JSON"
                )
            for name, entry in of_rank.files.items():
                file = folder / name
                if not file.is_file() or file.stat().st_size != entry.size:
                    return CheckpointError(
                        f"{file}, written by rank {rank} on {of_rank.host}, is not there on "
                        f"{socket.gethostname()}: set run.directory to a folder that all hosts share"
                    )
        with writing(folder):
            files = {name: entry for of_rank in written for name, entry in of_rank.files.items()}
            places = {name: shard_name(rank, ranks) for rank, of_rank in enumerate(written) for name in of_rank.weights}
            WeightsFile(folder).write_index(places, {name: files[name] for name in set(places.values())})
            pieces = {optimizer_name(rank, ranks): of_rank.pieces for rank, of_rank in enumerate(written)}
            optimizer_files.write_index(folder, pieces)
            write_json(folder / TRAINER_NAME, save.trainer)
            write_json(folder / DATA_NAME, [of_rank.data_state for of_rank in written])
            vocabulary = self._tokenizer.vocabulary.file_name
            shutil.copyfile(self._tokenizer.path, folder / vocabulary)
            own = (INDEX_NAME, optimizer_files.INDEX_NAME, TRAINER_NAME, DATA_NAME, vocabulary)
            files |= entries(folder, own)
            complete(folder, Manifest(save.trainer["step"], topology_of(self._plan), self._tokenizer.sha256, files))
            plan_file = self._plan.run_dir / PLAN_NAME
            if not plan_file.exists():  # the run's folder has gone, and this save has made it again
                write_atomically(plan_file, plan_to_json(self._plan))
        return None

    def close(self) -> None:
        """End the threads. A save in flight is left incomplete."""
        self._copier.shutdown()
        self._writer.shutdown()


def _named(error: Exception, folder: Path) -> BaseException:
    """An error that can be sent to other ranks."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, str(error.filename or folder))
    return CheckpointError(f"{folder} could not be written: {type(error).__name__}: {error}")


def optimizer_updates(folder: Path) -> dict[str, int]:
    """How many updates the moments of each tensor have seen, without those that were frozen. Raises CheckpointError."""
    with _reading(folder):
        return OptimizerFiles(folder).updates


def data_states(folder: Path) -> list[dict[str, Any]]:
    """The positions in the data of the ranks that wrote a checkpoint. Raises CheckpointError."""
    with _reading(folder):
        found = json.loads((folder / DATA_NAME).read_text())
        if not (isinstance(found, list) and all(isinstance(state, dict) for state in found)):
            raise ValueError(f"{DATA_NAME} is no list of positions")
        return found


def restore(folder: Path, manifest: Manifest, plan: RunPlan, ranks: Ranks, engine: Any) -> dict[str, Any]:
    """Load a checkpoint of any topology into the engine, and the random state. Returns the state of `OptimizerStep`.

    Raises CheckpointError for files of another content. Collective.
    """
    with _reading(folder):
        trainer = json.loads((folder / TRAINER_NAME).read_text())
        files = OptimizerFiles(folder)
        make_moments(engine, files.updates)
        for found in ranges(engine):
            files.fill(found)
        for found, memory in frozen(engine):
            values = torch.empty(len(memory))
            files.fill(found._replace(values={MASTER: values}))
            memory.copy_(values)
        after_loading(engine)
        load_buffers(engine.module, folder)
        for name in _COUNTERS:
            setattr(engine, name, trainer["engine"][name])
        begun = first_step(plan.recipe)
        if engine.lr_scheduler is not None and trainer["schedule"] is not None and trainer["step"] > begun:
            trainer["schedule"]["last_batch_iteration"] += trainer["first_step"] - begun  # if stages have been changed
            engine.lr_scheduler.load_state_dict(trainer["schedule"])
            engine.lr_scheduler.step(engine.lr_scheduler.last_batch_iteration)  # gives the groups their rates
        if manifest.topology.world_size == ranks.world_size:
            _restore_random_state(folder, ranks)
        else:  # only routing noise depends on it
            torch.manual_seed(((plan.recipe.run.seed << 20) + trainer["step"] << 20) + ranks.rank)
        return {name: trainer.get(name) for name in STEP_STATE}  # a checkpoint may be older than one of them


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Errors of a file with another content, which its manifest vouches for, become a CheckpointError."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, EOFError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{folder} cannot be read ({reason}): remove it to resume an older one") from error


def _restore_random_state(folder: Path, ranks: Ranks) -> None:
    file = TensorFiles(folder).file(optimizer_name(ranks.rank, ranks.world_size))
    torch.set_rng_state(file.get_tensor("rng/cpu"))
    if torch.cuda.is_available() and "rng/cuda" in file.keys():  # noqa: SIM118, it is no dict
        torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))
