"""Our scores in the layout of lmms-eval's results; `tests/cli/test_lmms_eval.py` lets lmms-eval read them."""

from __future__ import annotations

import json

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.evaluation.dealing import Dealer
from dsmoe_vl.evaluation.lmms_results import write_results
from dsmoe_vl.evaluation.run import evaluate_run
from dsmoe_vl.evaluation.task_evaluation import Answer, Options
from dsmoe_vl.report.content import ScoreLabel
from tests.support.trained import THREE_TASKS, random_run

PARTS = {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"}


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """An evaluated run: its folder, and the results."""
    run = random_run(tiny, tmp_path_factory.mktemp("run") / "run", *THREE_TASKS)
    evaluate_run(Options(run, limit=3, show=0, max_tokens=4, lmms=True), Dealer())
    (path,) = (run / "lmms").glob("*_results.json")
    return run, path, json.loads(path.read_text())


def test_the_scores_are_those_of_eval_json(written):
    run, _, results = written
    ours = json.loads((run / "eval.json").read_text())
    flat = {
        f"{source.split('/')[-1]}_{task}": scores for source, tasks in ours.items() for task, scores in tasks.items()
    }
    assert set(flat) == {
        "images_eval_caption",
        "images_eval_retrieval",
        "videos_eval_caption",
        "videos_eval_retrieval",
        "videos_eval_summary",
    }
    for name, scores in flat.items():
        theirs = results["results"][name]
        assert {metric: theirs[f"{metric},none"] for metric in scores} == scores and theirs["alias"] == name
    assert all(set(results[part]) == set(flat) for part in PARTS)
    assert results["n-samples"]["images_eval_caption"] == {"original": 3, "effective": 3}
    assert results["config"]["step"] == 7 and results["model_name"] == "run"


def test_the_direction_of_a_score(written):
    _, _, results = written
    directions = results["higher_is_better"]
    assert directions["videos_eval_summary"]["importance_error"] is False
    assert directions["images_eval_retrieval"]["text_to_media_median_rank"] is False
    assert directions["images_eval_caption"]["cider_d"] is True
    assert "samples" not in directions["images_eval_caption"]


def test_generated_texts_are_samples(written, tiny):
    run, path, _ = written
    prefix = path.name.removesuffix("_results.json")
    names = {file.name for file in (run / "lmms").iterdir()} - {path.name}
    tasks = ("images_eval_caption", "videos_eval_caption", "videos_eval_summary")
    assert names == {f"{prefix}_samples_{task}.jsonl" for task in tasks}
    lines = [json.loads(line) for line in path.with_name(f"{prefix}_samples_{tasks[0]}.jsonl").read_text().splitlines()]
    samples = list(iterate_samples(SourceConfig("eval", str(tiny.data / "images_eval"))))[:3]
    assert [line["key"] for line in lines] == [sample.key for sample in samples]
    assert [line["doc_id"] for line in lines] == [0, 1, 2] and len({line["doc_hash"] for line in lines}) == 3
    assert all(isinstance(line["filtered_resps"], str) and line["target"] for line in lines)


def test_folders_of_one_name_and_urls_are_told_apart(tmp_path):
    sources = ["a/val", "b/val/", "pipe:curl http://x/y z?q=1"]
    answer = Answer("k", ["a dog", "a \udc80"], "a cat", {})
    path = write_results(
        Options(tmp_path),
        1,
        {source: {"caption": {"samples": 1, "cider_d": 0.5}} for source in sources},
        {source: {"caption": [answer]} for source in sources},
        {"caption": {"samples": ScoreLabel("", "count")}},
    )
    assert list(json.loads(path.read_text())["results"]) == ["val_caption", "val_2_caption", "y_z_q_1_caption"]
    assert len(list((tmp_path / "lmms").glob("*.jsonl"))) == 3
