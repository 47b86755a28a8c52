"""Our models in lmms-eval: `lmms-eval --model dsmoe_vl --model_args run=runs/NAME --tasks TASK`.

lmms-eval finds `MANIFEST` by the entry point in pyproject.toml. No other file imports lmms-eval, and nothing of ours
imports this one. Written against lmms-eval 0.7.3.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from dsmoe_vl.data.sample import Sample
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.inference.generate import MAX_TOKENS, caption, caption_task
from dsmoe_vl.inference.load import load_run
from dsmoe_vl.inference.media import BATCH, encode_all, read_file, to_sample
from dsmoe_vl.inference.text_loss import text_losses
from dsmoe_vl.inference.token_search import Search
from dsmoe_vl.parallel.ranks import whole_number

MANIFEST = ModelManifest("dsmoe_vl", simple_class_path=f"{__name__}.LmmsEvalModel")

_SETTINGS = ("max_new_tokens", "until", "num_beams", "do_sample", "temperature", "top_p")


class LmmsEvalModel(lmms):
    """A run, or an exported model, that captions the one picture or video of a request. The request's text is not read.

    Several ranks: lmms-eval deals the documents, and each rank loads the model, on the GPU of its LOCAL_RANK if it can.
    """

    def __init__(
        self,
        run: str = "",
        device: str | None = None,
        batch_size: int | str = BATCH,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        """`seed`: of sampling. Raises ConfigError for other arguments, CheckpointError if the run cannot be loaded."""
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval's, for "auto"
        if not run or unknown:
            reason = "gives no run" if not run else f"has {', '.join(unknown)}"
            raise ConfigError(f"--model_args {reason}: give run=FOLDER, and seed=N for other samples")
        self.batch_size = BATCH if batch_size == "auto" else _positive("--batch_size", batch_size)
        self.seed = _positive("--model_args seed", seed, least=0)
        self.trained = load_run(Path(run), _device_of_rank(device))
        self.device = self.trained.device  # lmms-eval gathers on it
        self.task = caption_task(self.trained)
        self._told: set[str] = set()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Captions. A repeated request is another sample, if it samples."""
        texts = [""] * len(requests)
        alike: dict[tuple[Search, int], list[int]] = defaultdict(list)
        repeats: Counter[tuple[str, str, int]] = Counter()
        for number, request in enumerate(requests):
            _, settings, _, document, task, split = request.args
            alike[self._search(settings, task, repeats[task, split, document])].append(number)
            repeats[task, split, document] += 1
        with tqdm(total=len(requests), desc="captions", disable=self.rank != 0) as bar:
            for (search, max_tokens), numbers in alike.items():
                for some in _batches(numbers, self.batch_size):
                    samples = [self._sample(requests[number]) for number in some]
                    for number, text in zip(some, caption(self.trained, samples, max_tokens, search), strict=True):
                        texts[number] = _before(text, requests[number].args[1].get("until"))
                    bar.update(len(some))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request (loss in nats, whether greedy decoding writes this text): the smaller, the more probable.

        lmms-eval's own models return losses here too, and its `multiple_choice` takes the smallest. It turns a bare
        pair of numbers into a str, so the pair travels in a GenerationResult.
        """
        results: list[GenerationResult] = []
        with tqdm(total=len(requests), desc="losses", disable=self.rank != 0) as bar:
            for some in _batches(requests, self.batch_size):
                prompts = encode_all(self.task.prompt, [self._sample(request) for request in some])
                found = text_losses(self.trained, prompts, [self._continuation(request) for request in some])
                results += [GenerationResult(tuple(loss)) for loss in found]
                bar.update(len(some))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("models of dsmoe_vl caption and do not converse: choose tasks of one round")

    def _document(self, request: Instance) -> Any:
        if len(request.args) < 6:
            raise ConfigError(
                f"task {request.task_name}: it asks for the probability of a text without its picture, which models of "
                "dsmoe_vl do not know: leave the metric acc_mutual_info out"
            )
        *_, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _sample(self, request: Instance) -> Sample:
        """Raises DataError unless the document has exactly one picture or video."""
        document = self._document(request)
        visuals = request.args[2](document) or []
        place = f"task {request.args[4]}, document {request.args[3]}"
        if len(visuals) != 1:
            raise DataError(
                f"{place} has {len(visuals)} pictures and videos: models of dsmoe_vl caption one; choose a task of one"
            )
        (visual,) = visuals
        try:
            if isinstance(visual, (str, os.PathLike)):
                return read_file(Path(visual), "video", by_content=True)
            return to_sample(visual, "image", place)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error

    def _continuation(self, request: Instance) -> str:
        """The text to score, without lmms-eval's blank between a question and its answer."""
        text = request.args[1]
        return (text(self._document(request)) if callable(text) else text).lstrip()

    def _search(self, settings: Mapping[str, Any], task: str, repeat: int) -> tuple[Search, int]:
        """The search and the most tokens of `generation_kwargs`. Settings without a counterpart are named on stderr."""
        for name in settings.keys() - set(_SETTINGS) - self._told:
            self._told.add(name)
            print(f"task {task}: generation_kwargs.{name} is not used: dsmoe_vl has no such setting", file=sys.stderr)
        max_tokens, beams = settings.get("max_new_tokens", MAX_TOKENS), settings.get("num_beams") or 1
        temperature = settings.get("temperature")
        if temperature is None:
            temperature = 1.0 if settings.get("do_sample") else 0.0
        try:
            if not temperature or settings.get("do_sample") is False:
                return Search(beams), max_tokens
            top_p = settings.get("top_p")
            return Search(beams, 1.0 if top_p is None else top_p, temperature, self.seed + repeat), max_tokens
        except ConfigError as error:
            raise ConfigError(f"generation_kwargs of task {task}: {error}") from None


def _before(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first of the stops."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.partition(stop)[0]
    return text


def _device_of_rank(name: str | None) -> str | None:
    if name in (None, "cuda") and (count := torch.cuda.device_count()):
        rank = whole_number({"LOCAL_RANK": "0", **os.environ}, "LOCAL_RANK", "the launcher of lmms-eval")
        return f"cuda:{rank % count}"
    return name


def _positive(name: str, value: Any, least: int = 1) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name} = {value!r}: must be a whole number of at least {least}")
    return number


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
