"""The training loop: optimizer steps (`step.py`), evaluation, checkpoints and a clean stop."""

from __future__ import annotations

import time
from pathlib import Path

from dsmoe_vl.checkpoint.choice import newest_sound
from dsmoe_vl.checkpoint.manifest import Manifest
from dsmoe_vl.checkpoint.store import CHECKPOINTS_NAME, prune, require_tokenizer
from dsmoe_vl.checkpoint.training_state import Saver, data_states, optimizer_updates, restore, topology_of
from dsmoe_vl.checkpoint.weights import require_same_model
from dsmoe_vl.config.recipe import first_step
from dsmoe_vl.console import tell
from dsmoe_vl.data.error_log import merge_reports
from dsmoe_vl.data.loader import Loader
from dsmoe_vl.data.pack_shape import SpeechShape
from dsmoe_vl.data.shards.verify import ShardVerifier
from dsmoe_vl.data.tokenizer import Tokenizer
from dsmoe_vl.monitor.profiler import StepProfiler
from dsmoe_vl.monitor.recorder import RouterRecorder
from dsmoe_vl.monitor.run_log import RunLog
from dsmoe_vl.optim.l1 import sparsity
from dsmoe_vl.parallel.device import memory_gib, peak_flops, use_device
from dsmoe_vl.parallel.process_group import HostGroup
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.parallel.warm_up import warm_up
from dsmoe_vl.planner.parameters import experts_of_layers
from dsmoe_vl.planner.plan import RunPlan
from dsmoe_vl.planner.stages import stage_after
from dsmoe_vl.planner.trained import changed_parts
from dsmoe_vl.tasks.registry import Encoder, build_tasks
from dsmoe_vl.training.engine import build_engine
from dsmoe_vl.training.held_out import HeldOut
from dsmoe_vl.training.probe import check_probe
from dsmoe_vl.training.signals import StopRequest
from dsmoe_vl.training.skipped import SkippedSteps
from dsmoe_vl.training.step import OptimizerStep, StepResult
from dsmoe_vl.training.watchdog import Watchdog
from dsmoe_vl.training.window import Window


class Trainer:
    """One run on one rank, or the stage of it that follows its newest checkpoint. Needs a process group, which
    `start.py` creates."""

    def __init__(self, plan: RunPlan, ranks: Ranks, stop: StopRequest) -> None:
        self.plan, self.ranks = plan, ranks
        recipe = plan.recipe
        self.stop = stop
        self.watchdog = Watchdog(ranks, plan.run_dir, recipe.run.stall_seconds)
        self.watchdog.enter("start: data")
        self.device = use_device(plan.device, ranks)
        self.host = HostGroup()
        self.tokenizer = Tokenizer.of(recipe)
        self.tasks = build_tasks(recipe, self.tokenizer)
        encode = Encoder(self.tasks)
        self.loader = Loader(
            recipe.data,
            recipe.data.sources,
            encode,
            patch_size=recipe.model.vision.patch_size,
            merge=recipe.model.vision.merge,
            seed=recipe.run.seed,
            rank=ranks.rank,
            ranks=ranks.world_size,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            quarantine=plan.run_dir / f"quarantine_{ranks.rank:05d}.jsonl",
            speech=SpeechShape.of(recipe),
        )
        self.step = 0
        self.begun = self.saved = 0  # the steps of the newest checkpoint and of the newest that is complete
        self.has_older = False  # checkpoints that the newest replaces
        self.watchdog.enter("start: checkpoint")
        found = self._checkpoint()
        self.batches = iter(self.loader) if self.step < recipe.run.steps else iter(())  # workers before the engine
        whole, (self.stage, plan) = plan, stage_after(plan, self.step)
        self.plan = plan
        self.saver = Saver(whole, ranks, self.host, self.tokenizer, first_step(plan.recipe))
        as_they_are = Encoder(build_tasks(recipe, self.tokenizer, training=False))
        self.watchdog.enter("start: held-out samples")
        self.held_out = HeldOut(whole, ranks, as_they_are, self.host)
        self.watchdog.enter("start: engine")
        self.engine = build_engine(plan, ranks, self.tasks, None if found is None else optimizer_updates(found[0]))
        self.saver.prepare(self.engine)
        self.watchdog.enter("start: groups")
        warm_up()  # those that the engine and the saver have made
        said = check_probe(self.engine, plan, self.device) if found is None else None
        if said is not None and ranks.rank == 0:
            tell(f"note: starts from {recipe.model.init_from} as its makers' program computes it: {said}")
        self.take_step = OptimizerStep(plan, ranks, self.engine, self.host, self.device)
        self.take_step.clock.entered = self.watchdog.enter
        self.take_step.before_update = self.saver.before_update
        self.skipped = SkippedSteps(plan)
        if found is not None:
            self.watchdog.enter("start: state")
            self.take_step.load_state_dict(restore(*found, plan, ranks, self.engine))
        # One process of a host hashes its shards: hosts may have copies of their own.
        verified = self.loader.indexes if ranks.local_rank == 0 else {}
        self.verifier = ShardVerifier(verified, recipe.data.verify_mib_per_second)
        self._read = self.loader.report()  # empty in a new run; in a resumed run, the epochs so far
        self.log = RunLog(whole, ranks.rank, self.step)
        if whole.recipe.stages:
            ends = f"stage {self.stage} of {len(whole.recipe.stages)} ends at step {plan.recipe.run.steps}"
            self.log.say(f"{ends}; it trains {', '.join(plan.trained.parts)}")
        peak = peak_flops(self.device, plan.precision)
        self.window = Window(plan, None if peak is None else peak * ranks.world_size)
        self.profiler = StepProfiler(plan.run_dir, recipe.run.profile_steps if ranks.rank == 0 else (), ranks.rank)
        self.recorder: RouterRecorder | None = None
        if ranks.rank == 0 and recipe.run.router_every and experts_of_layers(recipe):
            self.recorder = RouterRecorder(plan, self.step)

    def fit(self) -> None:
        """Train until `run.steps` or a stop request; both end with a checkpoint.

        Raises DivergedError after `run.max_skipped_steps` steps in a row that were skipped, CheckpointError instead of
        saving weights that are not finite.
        """
        run = self.plan.recipe.run
        if self.step >= run.steps:
            self.log.say(
                f"trained to step {self.step} of {run.steps} already: raise run.steps to go on, or set another run.name"
            )
        elif self.step:
            self.log.say(f"resumed at step {self.step}")
        self.begun = self.saved = self.step
        is_due = stopping = False  # a checkpoint is due; a stop was requested
        if self.step == 0:
            self.evaluate()  # held-out losses before training
        while self.step < run.steps and not stopping:
            self.profiler.before(self.step + 1)
            started = time.perf_counter()
            self.watchdog.step, self.watchdog.keys = self.step + 1, ()
            self.watchdog.enter("wait for data", self.loader.waits_for)
            own = next(self.batches)
            self.watchdog.keys = [batch.keys for batch in own]
            waited = time.perf_counter() - started
            shared = self.take_step.share(own, self.stop.received, self.saver.is_writing)
            stopping = shared.stopping
            if self.saver.in_flight and not shared.writing:
                self._finish_save()
            self.step += 1
            last = self.step == run.steps
            logs = last or stopping or self.step % run.log_every == 0
            result = self.take_step(shared.batches, shared.counts, part_norms=logs)
            self.watchdog.has_started = True
            self.window.add(result)
            self.window.time(time.perf_counter() - started, waited)
            self.log.attempt("the trace", lambda: self._tell_of_trace(self.profiler.after(self.step)))
            self.log.advance()
            self.skipped.count(result.skipped)
            if self.skipped.in_row:
                self.log.say(self.skipped.line(self.step))
            elif self.has_older:  # the newest checkpoint is complete, and this step after it has worked
                self._prune()
            ends = self.skipped.are_too_many(last or stopping)
            if logs or ends:
                self._log_interval()
            if ends:
                if self.saver.in_flight:
                    self._finish_save()
                self.log.close()
                raise self.skipped.error(self.step, self.saved)
            self._record(result)
            if last or (run.evaluate_every and self.step % run.evaluate_every == 0):
                self.evaluate()
            is_due = is_due or last or self.step % run.checkpoint_every == 0
            # These weights may be what makes steps fail: a checkpoint waits for a step that works.
            if is_due and (last or not self.skipped.in_row):
                self.save()
                is_due = False
        if self.begun != self.step:
            self.save()
        if self.saver.in_flight:
            self._finish_save(last=True)
            if not (stopping or self.skipped.in_row):
                self._prune()
        self.log.attempt("the trace", lambda: self._tell_of_trace(self.profiler.close()))
        if self.step < run.steps:
            self.log.say(f"stopped at step {self.step} of {self.log.steps}; the same command continues from here")

    def _log_interval(self) -> None:
        """Log the values of the interval that ends here. Collective."""
        self.watchdog.enter("log")
        values = self.window.close(self.take_step.clock.read())
        self.log.log(self.step, {**values, **self._sparsity(), **self._samples_read(), **self._memory()})

    def _record(self, result: StepResult) -> None:
        """Add a step's routing to the recorder, and log its record when one is due. Rank 0 only."""
        if self.recorder is None or result.routing is None:
            return
        if result.skipped is None:
            self.recorder.add(result.routing, result.counts)
        if self.step % self.plan.recipe.run.router_every == 0:
            self._log_router(self.recorder)

    def _log_router(self, recorder: RouterRecorder) -> None:
        self.log.attempt("router.npz", lambda: self.log.log_router(recorder.record(self.step)))

    def _tell_of_trace(self, path: Path | None) -> None:
        if path is not None:
            self.log.say(f"wrote {path}: open it in https://ui.perfetto.dev")

    @property
    def is_stopped(self) -> bool:
        """Whether `fit` ended before the end of its stage."""
        return self.step < self.plan.recipe.run.steps

    def evaluate(self) -> None:
        """Log held-out losses. Collective."""
        if self.plan.recipe.data.evaluation:
            self.watchdog.enter("held-out losses")
            self.log.log_evaluation(self.step, self.held_out.losses(self.engine, self.device))

    def save(self) -> None:
        """Begin a checkpoint of the current step, after the one before is complete. Collective."""
        if self.saver.in_flight:
            self._finish_save()
        if self.recorder is not None:  # a resumed run also needs it up to this step
            self._log_router(self.recorder)
        self.watchdog.enter("save")
        self.saver.begin(self.engine, self.step, self.take_step.state_dict(), self.loader.state_dict())
        self.begun = self.step

    def _finish_save(self, last: bool = False) -> None:
        """Complete the checkpoint that was begun. Collective. `last`: no other will come, so an error ends the run."""
        self.watchdog.enter("save")
        try:
            folder = self.saver.finish()
        except OSError as error:
            if last:
                raise
            self.log.say(
                f"warning: {error.filename} cannot be written: {error.strerror}; there is no checkpoint of that step, "
                "and training goes on"
            )
            return
        self.log.say(f"saved {folder}")
        self.saved, self.has_older = self.begun, True
        self.watchdog.enter("samples")
        self.log.log_samples(self.step)

    def _prune(self) -> None:
        """Remove older checkpoints, once a step from the newest has worked."""
        run = self.plan.recipe.run
        if self.ranks.rank == 0:
            prune(self.plan.run_dir / CHECKPOINTS_NAME, run.keep_checkpoints, run.keep_every)
        self.has_older = False

    def close(self) -> None:
        """End loader processes, writers and the engine."""
        self.saver.close()
        self.watchdog.enter("end")
        self.verifier.close()
        self.loader.close()
        self.log.close()
        self.engine.destroy()
        self.host.barrier()
        self.watchdog.close()

    def _checkpoint(self) -> tuple[Path, Manifest] | None:
        """The checkpoint to continue from, if any; sets the step and the position in the data. Collective."""
        found, notes = newest_sound(self.plan.run_dir / CHECKPOINTS_NAME, self.ranks, self.host)
        for note in notes if self.ranks.rank == 0 else ():
            tell(f"warning: {note}")
        if found is None:
            return None
        folder, manifest = found
        require_same_model(folder, self.plan.recipe)
        self.step = manifest.step
        if self.step >= self.plan.recipe.run.steps:  # nothing is left to train
            return None
        require_tokenizer(folder, manifest, self.tokenizer.sha256)
        now = topology_of(self.plan)
        if manifest.topology != now and self.ranks.rank == 0:
            tell(f"note: {folder} was written with {manifest.topology}; it is read into {now}")
        recipe = stage_after(self.plan, self.step)[1].recipe
        if (changed := changed_parts(recipe, optimizer_updates(folder))) and self.ranks.rank == 0:
            tell(f"note: since {folder.name}, {changed}")
        for note in self.loader.load_state_dict(data_states(folder)):
            if self.ranks.rank == 0:
                tell(f"note: since {folder.name}, {note}")
        return found

    def _sparsity(self) -> dict[str, float]:
        """Omega and the fractions of zeros, if the objective has the L1 term."""
        if self.plan.recipe.objective.l1.weight == 0:
            return {}
        return sparsity(self.engine.module, self.plan, self.ranks.rank, self.device)

    def _memory(self) -> dict[str, float]:
        """The maximum over ranks of each value."""
        of_ranks = self.host.gather(memory_gib(self.device))
        return {name: max(values[name] for values in of_ranks) for name in of_ranks[0]}

    def _samples_read(self) -> dict[str, int]:
        """Samples, errors and epoch of every source, over all ranks; prints new epochs and changed shards."""
        reports, findings = zip(*self.host.gather((self.loader.report(), self.verifier.findings())), strict=True)
        for finding in dict.fromkeys(finding for of_rank in findings for finding in of_rank):
            self.log.say(f"warning: {finding}")
        before, self._read = self._read, merge_reports(reports)
        for source in self.plan.recipe.data.sources:
            name = f"{source.name}/epoch"
            if self._read.get(name, 0) > before.get(name, 0):
                self.log.say(f"source {source.name} begins epoch {self._read[name]}: its samples occur again")
        return self._read
