"""Writes our scores as lmms-eval 0.7.3 writes its own, so that what reads its results reads ours as well.

The scores stay ours (`metrics/`): only names and layout are lmms-eval's. A task of it is one of ours on one folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe_vl.evaluation.task_evaluation import Answer, Options, Scores
from dsmoe_vl.files import distinct_names, write_atomically
from dsmoe_vl.report.content import ScoreLabel

_FILTER = "none"  # lmms-eval's name for an answer that was not changed before it was scored
_LOWER_IS_BETTER = ("_error", "_median_rank")  # how names of such scores end
_NONE = ScoreLabel("")


def write_results(
    options: Options,
    step: int,
    scores: Mapping[str, Mapping[str, Scores]],
    answers: Mapping[str, Mapping[str, list[Answer]]],
    labels: Mapping[str, Mapping[str, ScoreLabel]],
) -> Path:
    """Write `lmms/DATE_results.json` of the run, and `lmms/DATE_samples_TASK.jsonl` for tasks that generate texts.

    Args:
        step: of the checkpoint.
        scores, answers: by source (a folder of shards, or its URL) and task.
        labels: of scores, by task.

    Returns:
        The path of the results.
    """
    date, folder = time.strftime("%Y%m%d_%H%M%S", time.gmtime()), options.run / "lmms"
    folder.mkdir(exist_ok=True)
    content: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for source, short in zip(scores, distinct_names(_last_part(source) for source in scores), strict=True):
        for task, values in scores[source].items():
            name, given = f"{short}_{task}", answers[source][task]
            lines = [_line(number, answer) for number, answer in enumerate(given)]
            number = int(values.get("samples", len(lines)))
            content["results"][name] = _values(name, values)
            content["group_subtasks"][name] = []
            content["configs"][name] = _config(name, task, source, options)
            content["versions"][name] = "Yaml"  # lmms-eval's for a task without a version
            content["n-shot"][name] = 0
            content["higher_is_better"][name] = _directions(values, labels[task])
            content["n-samples"][name] = {"original": number, "effective": number}
            if lines:
                write_atomically(
                    folder / f"{date}_samples_{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
                )
    path, run = folder / f"{date}_results.json", options.run.resolve().name
    about = {
        "config": {
            "model": "dsmoe_vl",
            "model_args": f"run={options.run}",
            "step": step,
            "device": options.device,
            "limit": options.limit,
        },
        "date": date,
        "model_source": "dsmoe_vl",
        "model_name": run,
        "model_name_sanitized": run,
    }
    write_atomically(path, json.dumps({**content, **about}, indent=2))
    return path


def _last_part(source: str) -> str:
    """The end of a folder's path or a URL, as a part of the name of a file."""
    last = source.rstrip("/").rpartition("/")[2]
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in last) or "data"


def _values(name: str, values: Scores) -> dict[str, Any]:
    """The scores with the names that lmms-eval gives them. Our protocols have no standard errors."""
    found: dict[str, Any] = {"alias": name}
    for metric, value in values.items():
        found |= {f"{metric},{_FILTER}": value, f"{metric}_stderr,{_FILTER}": "N/A"}
    return found


def _config(name: str, task: str, source: str, options: Options) -> dict[str, Any]:
    ours = {"task": task, "max_tokens": options.max_tokens, "gallery": options.gallery, "split": options.split}
    return {"task": name, "dataset_path": source, "metadata": ours}


def _directions(values: Scores, labels: Mapping[str, ScoreLabel]) -> dict[str, bool]:
    """Whether higher is better, by score. A number of samples is neither."""
    lower = {metric: metric.endswith(_LOWER_IS_BETTER) for metric in values}
    return {metric: not low for metric, low in lower.items() if low or labels.get(metric, _NONE).unit != "count"}


def _line(number: int, answer: Answer) -> dict[str, Any]:
    """A sample as lmms-eval writes it. `input` would be the text of the prompt; ours has none."""
    references = list(answer.references)
    return {
        "doc_id": number,
        "key": answer.key,
        "target": references[0] if len(references) == 1 else str(references),
        "filtered_resps": answer.text,
        "doc_hash": hashlib.sha256(json.dumps([answer.key, references]).encode()).hexdigest(),
        **answer.scores,
        "input": "",
    }
