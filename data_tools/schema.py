"""Checks of a sample's KEY.json, as this project or another tool has written it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.data.shards.index import SCHEMA_VERSION


def is_own(sample: Sample) -> bool:
    """Whether `data_tools` wrote this sample."""
    return "schema_version" in sample.meta


def problems(sample: Sample) -> Iterator[str]:
    """The problems of a sample, each as `kind: detail`."""
    contents, meta = contents_of(sample), sample.meta
    yield from contents.problems
    if (is_own(sample) or "summary" in contents.tasks) and (problem := curves_problem(meta)):
        yield problem
    if not is_own(sample):
        return
    if meta["schema_version"] != SCHEMA_VERSION:
        yield f"other schema_version: {meta['schema_version']}, this version reads {SCHEMA_VERSION}"
    for name in ("width", "height", "duration_seconds", "fps", "speech_seconds"):
        if name in meta and not _is_positive(meta[name]):
            yield f"no positive number: {name} is {meta[name]!r:.40}"
    if sample.media is not None and meta.get("sha256") != hashlib.sha256(sample.media).hexdigest():
        yield "media differ from the sha256 in json"
    if sample.recording is not None and meta.get("recording_sha256") != hashlib.sha256(sample.recording).hexdigest():
        yield "recording differs from the recording_sha256 in json"


def curves_problem(meta: dict[str, Any]) -> str:
    """The problem of `importance` or `saliency` as `kind: detail`; "" if they are correct or absent."""
    importance, saliency = meta.get("importance"), meta.get("saliency")
    if importance is not None and not _is_curve(importance):
        return "malformed importance: a list of numbers from 0 to 1 is expected"
    if saliency is None:
        return ""
    is_list = isinstance(saliency, list) and bool(saliency) and all(_is_curve(curve) for curve in saliency)
    if not is_list or len({len(curve) for curve in saliency}) > 1:
        return "malformed saliency: a list of equally long lists of numbers from 0 to 1 is expected, one per annotator"
    return ""


def _is_positive(value: Any) -> bool:
    """Whether it is a number that a float can be; true is none, although Python counts it as one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in value)
