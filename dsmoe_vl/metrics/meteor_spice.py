"""METEOR and SPICE of captions: Java programs, from the optional extra `metrics`.

Install it with `pip install 'dsmoe-vl[metrics]'`, and also a Java runtime.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsmoe_vl.errors import DataError
from dsmoe_vl.metrics.captions import tokenized

# SPICE's parser. The package does not contain it: it would download 400 MB on first use, without asking.
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


CHOICES = ("meteor", "spice")  # spice: both


def require(choice: str) -> None:
    """Raises DataError naming what the scores of a choice need and do not find."""
    package = _package()
    if shutil.which("java") is None:
        raise DataError("METEOR and SPICE need Java, and there is no `java` on the PATH: install a Java runtime")
    if choice == "spice":
        _require_spice(package)


def java_metrics(
    generated: Sequence[str], references: Sequence[Sequence[str]], choice: str = "meteor"
) -> dict[str, float]:
    """`meteor` (Denkowski and Lavie 2014), and with the choice "spice" also `spice` (Anderson et al. 2016): 0 to 1, as
    in coco-caption.

    METEOR is over the whole corpus, SPICE a mean over captions. Java may need 2 GB of memory, for SPICE 8 GB.

    Raises DataError naming what is missing or has failed, and ValueError as `caption_metrics` does.
    """
    sentences, truths = tokenized(generated, references)
    require(choice)
    # Both scorers take {image: [sentence, ...]}.
    truth = {image: [" ".join(words) for words in own] for image, own in enumerate(truths)}
    found = {image: [" ".join(words)] for image, words in enumerate(sentences)}
    scores = {"meteor": _run("METEOR", "meteor.meteor", "Meteor", truth, found)}
    if choice == "spice":
        scores["spice"] = _run("SPICE", "spice.spice", "Spice", truth, found)
    return scores


def _package() -> Path:
    """The folder of pycocoevalcap."""
    specification = importlib.util.find_spec("pycocoevalcap")
    if specification is None or not specification.submodule_search_locations:
        raise DataError("METEOR and SPICE need the package pycocoevalcap: pip install 'dsmoe-vl[metrics]'")
    return Path(next(iter(specification.submodule_search_locations)))


def _require_spice(package: Path) -> None:
    missing = [name for name in SPICE_JARS if not (package / "spice" / "lib" / name).is_file()]
    if missing:
        raise DataError(
            f"SPICE needs {' and '.join(missing)} in {package / 'spice' / 'lib'}: copy them from Stanford CoreNLP 3.6.0"
            " (stanford-corenlp-full-2015-12-09.zip), or run `python -m pycocoevalcap.spice.get_stanford_models` once "
            "with internet access"
        )


def _run(name: str, module: str, scorer: str, truth: dict[int, list[str]], found: dict[int, list[str]]) -> float:
    """Run one scorer of the package. If its Java process dies, the pipe is closed or the answer is empty."""
    process = getattr(importlib.import_module(f"pycocoevalcap.{module}"), scorer)()
    try:
        score, _ = process.compute_score(truth, found)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        lock = getattr(process, "lock", None)
        if lock is not None and lock.locked():  # else its destructor waits forever
            lock.release()
        raise DataError(
            f"{name} has failed: check that `java -version` works and 2 GB of memory are free ({error})"
        ) from error
    return float(score)
