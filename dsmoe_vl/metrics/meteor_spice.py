"""METEOR and SPICE of captions: Java programs, which the optional extra `metrics` brings along.

Install it with `pip install 'dsmoe-vl[metrics]'`, and a Java runtime beside it.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsmoe_vl.errors import DataError
from dsmoe_vl.metrics.captions import tokenized

# SPICE's parser, which the package does not hold: it would download 400 MB on first use, without asking.
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def java_metrics(
    generated: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False
) -> dict[str, float]:
    """`meteor` (Denkowski and Lavie 2014), and if wanted `spice` (Anderson et al. 2016): 0 to 1, as coco-caption's.

    METEOR is of all captions as one text, SPICE a mean over captions. Java may take 2 GB of memory, for SPICE 8.

    Raises DataError naming what is missing or has failed, and ValueError as `caption_metrics` does.
    """
    sentences, truths = tokenized(generated, references)
    package = _package()
    if shutil.which("java") is None:
        raise DataError("METEOR and SPICE need Java, and there is no `java` on the PATH: install a Java runtime")
    if spice:
        _require_spice(package)
    # Both are given {image: [sentence, ...]}.
    truth = {image: [" ".join(words) for words in own] for image, own in enumerate(truths)}
    found = {image: [" ".join(words)] for image, words in enumerate(sentences)}
    scores = {"meteor": _run("METEOR", "meteor.meteor", "Meteor", truth, found)}
    if spice:
        scores["spice"] = _run("SPICE", "spice.spice", "Spice", truth, found)
    return scores


def _package() -> Path:
    """Where pycocoevalcap is."""
    specification = importlib.util.find_spec("pycocoevalcap")
    if specification is None or not specification.submodule_search_locations:
        raise DataError("METEOR and SPICE need the package pycocoevalcap: pip install 'dsmoe-vl[metrics]'")
    return Path(next(iter(specification.submodule_search_locations)))


def _require_spice(package: Path) -> None:
    missing = [name for name in SPICE_JARS if not (package / "spice" / "lib" / name).is_file()]
    if missing:
        raise DataError(
            f"SPICE needs {' and '.join(missing)} in {package / 'spice' / 'lib'}: take them from Stanford CoreNLP 3.6.0"
            " (stanford-corenlp-full-2015-12-09.zip), or run `python -m pycocoevalcap.spice.get_stanford_models` once "
            "where the internet can be reached"
        )


def _run(name: str, module: str, scorer: str, truth: dict[int, list[str]], found: dict[int, list[str]]) -> float:
    """One of the package's scorers; a dead Java process shows as a closed pipe or as an empty answer."""
    process = getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)()
    try:
        score, _ = process.compute_score(truth, found)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lock = getattr(process, "lock", None)
        if lock is not None and lock.locked():  # else its destructor waits for it for ever
            lock.release()
        raise DataError(f"{name} has failed; does `java -version` run, with 2 GB to spare? ({error})") from error
    return float(score)
