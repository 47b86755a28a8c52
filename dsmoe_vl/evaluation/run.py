"""Runs an evaluation: all folders and tasks, scores to the terminal and to files, and the report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from dsmoe_vl.checkpoint.store import PLAN_NAME, read_manifest
from dsmoe_vl.config.recipe import DataConfig, SourceConfig, learned_tasks
from dsmoe_vl.config.task_table import TASKS, TaskSpec, import_class, task_number
from dsmoe_vl.console import tell
from dsmoe_vl.errors import CheckpointError, ConfigError
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.examples import Counts
from dsmoe_vl.evaluation.expert_load import LoadCounter, total_load
from dsmoe_vl.evaluation.lmms_results import write_results
from dsmoe_vl.evaluation.passed_over import LABELS
from dsmoe_vl.evaluation.scalars import write_scalars
from dsmoe_vl.evaluation.task_evaluation import Answer, Folder, Options, Scores, TaskEvaluation
from dsmoe_vl.files import write_atomically, write_json, writing
from dsmoe_vl.inference.load import TrainedModel, load_run
from dsmoe_vl.metrics.meteor_spice import require
from dsmoe_vl.parallel.device import device_name, use_device
from dsmoe_vl.parallel.ranks import Ranks
from dsmoe_vl.report.content import Report, TaskPart
from dsmoe_vl.report.page import render


@dataclass(frozen=True)
class Evaluated:
    """By folder and task: scores and generated texts (the same on every rank), examples for the report (on rank 0)."""

    scores: dict[str, dict[str, Scores]]
    examples: dict[str, dict[str, Any]]
    answers: dict[str, dict[str, list[Answer]]]


def evaluate_on_ranks(options: Options, ranks: Ranks) -> None:
    """Evaluate on one of several ranks. Only rank 0 prints and writes. Raises DsmoeVlError."""
    kind = "cuda" if options.device.startswith("cuda") else "cpu"
    os.environ["DS_ACCELERATOR"] = kind  # DeepSpeed reads it when imported
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    from dsmoe_vl.parallel.process_group import HostGroup, start_process_group

    device = use_device(device_name(), ranks)
    if options.device == "cuda":
        options = replace(options, device=str(device))
    if ranks.rank != 0:
        options = replace(options, java="")  # a Java process a rank would take gigabytes, for scores that nobody reads
    start_process_group(ranks, kind)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if ranks.rank == 0 else nowhere):
        group = HostGroup()
        evaluate_run(options, Dealer(ranks, group))
        group.barrier()  # without it, a rank that exits while others are connected may abort
        dist.destroy_process_group()


def evaluate_run(options: Options, dealer: Dealer) -> None:
    """Scores to the terminal, eval.json and TensorBoard, and report.html. Raises DsmoeVlError. Collective."""
    if options.java:
        require(options.java)  # before hours of generating texts
    trained = load_run(options.run, options.device)
    manifest = read_manifest(trained.checkpoint)
    if manifest is None or len(set(dealer.gather(manifest.step))) > 1:
        raise CheckpointError(f"{options.run} got a new checkpoint while it was read: run the evaluation again")
    wanted = wanted_tasks(options, trained)
    evaluations: dict[str, TaskEvaluation] = {
        spec.name: import_class(spec.evaluation)(trained, options, dealer) for spec in wanted
    }
    counter = LoadCounter(trained.recipe)
    with counter.watching(trained.model.layers):
        evaluated = evaluate_folders(options, trained, evaluations, dealer)
    load = total_load(dealer.gather(counter.load()))
    if dealer.rank != 0:
        return
    for evaluation in evaluations.values():
        evaluation.finish()
    write_json(options.run / "eval.json", evaluated.scores)
    board = options.run / "tensorboard" / "eval"
    with writing(board):
        write_scalars(board, manifest.step, evaluated.scores)
    plan = json.loads((options.run / PLAN_NAME).read_text(encoding="utf-8"))
    parts = {spec.name: _part(spec, evaluations[spec.name], evaluated) for spec in wanted}
    report = Report(options.run.resolve().name, manifest.step, evaluated.scores, parts, load, plan)
    write_atomically(options.run / "report.html", render(report))
    tell(f"wrote {options.run / 'eval.json'} and {options.run / 'report.html'}")
    if options.lmms:
        labels = {name: {**evaluation.labels, **LABELS} for name, evaluation in evaluations.items()}
        tell(f"wrote {write_results(options, manifest.step, evaluated.scores, evaluated.answers, labels)}")


def wanted_tasks(options: Options, trained: TrainedModel) -> Sequence[TaskSpec]:
    """The tasks to evaluate, in the order that they were given. Raises ConfigError for a task that was not learned."""
    learned = {spec.name: spec for spec in learned_tasks(trained.recipe)}
    for name in options.tasks:
        if name not in learned:
            raise ConfigError(f"--tasks {name}: {options.run} has learned {', '.join(learned)}")
    return [learned[name] for name in options.tasks or learned]


def evaluate_folders(
    options: Options, trained: TrainedModel, evaluations: dict[str, TaskEvaluation], dealer: Dealer
) -> Evaluated:
    """Every task on every folder, folder by folder. Raises DsmoeVlError. Collective."""
    sources = held_out_sources(options.folders, trained.recipe.data)
    # The run's cache settings. Its plan may come from somebody else: only commands given on the command line are run.
    data = replace(trained.recipe.data, allow_pipe=bool(options.folders))
    if options.max_bad_fraction is not None:
        data = replace(data, max_bad_fraction=options.max_bad_fraction)
    tell(f"{trained.checkpoint}")
    evaluated = Evaluated({}, {}, {})
    for source in sources:
        path, counts = source.path, Counts.of(len(sources))
        folders = {
            name: Folder.open(TASKS[task_number(name)], source, data, dealer, options.limit, counts)
            for name in evaluations
        }
        results = {name: _evaluate(evaluation, folders[name]) for name, evaluation in evaluations.items()}
        evaluated.scores[path] = {name: scores for name, (scores, _) in results.items() if scores}
        evaluated.examples[path] = {name: examples for name, (_, examples) in results.items()}
        evaluated.answers[path] = {name: folder.answers for name, folder in folders.items()}
        for name, (scores, _) in results.items():
            for line in folders[name].passed.described():
                print(line if line.startswith(" ") else f"{path}: {name}: {line}")
            values = ", ".join(f"{metric} {value:.4g}" for metric, value in scores.items())
            tell(f"{path}: {name}: {values or 'no sample of this task'}")
    return evaluated


def _evaluate(evaluation: TaskEvaluation, folder: Folder) -> tuple[Scores, Any]:
    """As `TaskEvaluation.evaluate`, and the counts of samples that were passed over are among the scores. Raises
    DataError if too many are bad. Collective."""
    scores, examples = evaluation.evaluate(folder)
    folder.passed.together(folder.dealer)
    passed = folder.passed.scores()
    return ({**scores, **passed} if scores or "bad_samples" in passed else {}), examples


def held_out_sources(folders: Sequence[str], data: DataConfig) -> Sequence[SourceConfig]:
    """The recipe's held-out sources, or those `folders`: as the recipe has them, else with the last part of the path as
    the name."""
    known = {source.path: source for source in data.evaluation}
    return [known.get(path) or SourceConfig.at(path) for path in folders] or data.evaluation


def _part(spec: TaskSpec, evaluation: TaskEvaluation, evaluated: Evaluated) -> TaskPart:
    examples = {path: found[spec.name] for path, found in evaluated.examples.items()}
    return TaskPart(spec.title, {**evaluation.labels, **LABELS}, evaluation.section, examples)
