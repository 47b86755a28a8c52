"""Run by an interpreter with lmms-eval: `python -m tests.support.lmms_eval_run RUN FOLDER`; prints JSON.

FOLDER has `tasks/` (see `tests/cli/test_lmms_eval.py`), RUN has `lmms/`, written by launch/evaluate.py --format lmms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.baselines.loader import load_baseline
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table

import dsmoe_vl
from dsmoe_vl.errors import DsmoeVlError


def evaluated(run: Path, folder: Path) -> dict:
    """What lmms-eval makes of its tasks: scores, and the answer to each document."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model="dsmoe_vl",
        model_args=f"run={run}",
        tasks=["tiny_photos", "tiny_clips", "tiny_choices"],
        task_manager=manager,
        batch_size=3,
        device="cpu",
        bootstrap_iters=0,
    )
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return {"scores": found["results"], "answers": answers}


def own(run: Path, photos: list[str], clips: list[str]) -> dict:
    """The same captions by our own interface, in the same interpreter: PyAV's version may differ outside of it."""
    model = dsmoe_vl.load(run, "cpu")
    return {
        "tiny_photos": model.caption(photos, max_tokens=8),
        "tiny_clips": model.caption_video(clips, max_tokens=6, beams=2),
        "samples": [model.caption(photos[0], max_tokens=8, top_p=0.9, temperature=0.7, seed=seed) for seed in (5, 6)],
    }


def direct(run: Path, photos: list[str]) -> dict:
    """Answers and refusals of the class itself."""
    kind = get_model("dsmoe_vl")
    model = kind.create_from_arg_string(f"run={run},seed=5", {"batch_size": 2, "device": "cpu"})
    model.task_dict = {"t": {"test": photos}}

    def ask(settings: dict, visual=lambda photo: [photo], method: str = "generate_until", times: int = 1):
        arguments = ("What is it?", settings, visual, 0, "t", "test")
        request = Instance(method, arguments, 0, {"task": "t", "doc_id": 0, "repeats": times})
        return getattr(model, method)([request] * times)

    def refusal(call) -> str:
        try:
            call()
        except (DsmoeVlError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    whole = ask({"max_new_tokens": 8})[0]
    sampling = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    pair = Instance("loglikelihood", ("", "a dog"), 0, {"task": "t", "doc_id": 0, "repeats": 1})
    return {
        "whole": whole,
        "stopped": ask({"max_new_tokens": 8, "until": ["never", whole[3]]})[0],
        "samples": ask(sampling, times=2),
        "greedy": ask(sampling | {"do_sample": False, "repetition_penalty": 2})[0],
        "own text": ask(whole, method="loglikelihood")[0].text,
        "refusals": {
            "two pictures": refusal(lambda: ask({}, lambda photo: [photo, photo])),
            "no picture": refusal(lambda: ask({}, lambda photo: None)),
            "beams and sampling": refusal(lambda: ask(sampling | {"num_beams": 3})),
            "argument": refusal(lambda: kind.create_from_arg_string(f"run={run},pretrained=x")),
            "no run": refusal(lambda: kind.create_from_arg_string("")),
            "batch": refusal(lambda: kind.create_from_arg_string(f"run={run}", {"batch_size": "many"})),
            "rounds": refusal(lambda: model.generate_until_multi_round([])),
            "without its picture": refusal(lambda: model.loglikelihood([pair])),
        },
    }


def read_back(run: Path) -> dict:
    """What lmms-eval reads in files of ours."""
    (results,) = (run / "lmms").glob("*_results.json")
    samples = sorted((run / "lmms").glob("*_samples_images_eval_caption.jsonl"))
    scores, whole = load_baseline(str(samples[0]), "images_eval_caption")
    return {
        "table": make_table(json.loads(results.read_text())),
        "documents": sorted(scores),
        "same": whole == json.loads(results.read_text()),
    }


def main(run: Path, folder: Path) -> None:
    documents = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    photos, clips = ([document[kind] for document in documents] for kind in ("photo", "clip"))
    found = evaluated(run, folder)
    told = {"ours": own(run, photos, clips), "direct": direct(run, photos), "read": read_back(run)}
    print(json.dumps(found | told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
