"""`launch/doctor.py objective`: runs every split of a recipe's steps on one and on two ranks, and compares them."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.config.recipe import Recipe
from dsmoe_vl.parallel.ranks import Ranks

_TOLERANCE = 1e-5
_TIME_LIMIT_SECONDS = 1800


def examine(recipe_file: Path, deepspeed_file: Path, overrides: list[str], results: Path) -> None:
    """Run all splits of this world size on this rank; rank 0 writes the values to `results`.

    Gradients are compared here with the first split's, which the one-rank run saves to a file for two ranks. Raises
    DsmoeVlError.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from dsmoe_vl.doctor.silent_faults import silent_faults
    from dsmoe_vl.doctor.splits import Probe, Split, shrink
    from dsmoe_vl.parallel.process_group import HostGroup, start_process_group

    ranks = Ranks.discover()
    start_process_group(ranks, "cpu")
    recipe = shrink(load_recipe(recipe_file, overrides))
    coupled = couples_micro_steps(recipe)
    probe = Probe(recipe, load_deepspeed(deepspeed_file), ranks, HostGroup())
    gradients_file = results.with_name("gradients.pt")
    references = torch.load(gradients_file) if gradients_file.exists() else {}
    with results.open("w") if ranks.rank == 0 else open(os.devnull, "w") as file:
        if ranks.world_size == 1:
            file.write(json.dumps({"coupled": coupled, "faults": silent_faults(probe)}) + "\n")
        for split in Split.grid(ranks.world_size, (1, 2) if recipe.moe.backend == "capacity" else (1, 2, 3)):
            values, gradients = probe.run(split)
            reference = references.setdefault(split.accumulation if coupled else 0, gradients)
            difference = largest_gradient_difference(reference, gradients)
            line = {"split": asdict(split), "values": values, "gradients": difference}
            file.write(json.dumps(line) + "\n")
            file.flush()
    if ranks.world_size == 1:
        torch.save(references, gradients_file)


def run_splits(arguments: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """Run `examine` on one rank and on two; each rank is a process of `arguments` with `--results FILE` added.

    Returns the largest exit status and the lines of the results. Raises TimeoutExpired if ranks hang.
    """
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            results = Path(folder) / f"{ranks}.jsonl"
            print(f"running every split of {ranks} rank{'s' * (ranks > 1)}", flush=True)
            if status := _start_world(ranks, [*arguments, "--results", str(results)]):
                return status, lines
            lines += [json.loads(line) for line in results.read_text().splitlines()]
    return 0, lines


def _start_world(ranks: int, arguments: list[str]) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    try:
        statuses = [process.wait(_TIME_LIMIT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return max(map(abs, statuses))


def report(lines: list[dict[str, Any]]) -> bool:
    """Print the table and the faults. Returns whether all checks passed."""
    coupled = any(line.get("coupled") for line in lines)
    first = next(line["values"] for line in lines if "values" in line)
    references: dict[int, dict[str, float]] = {}
    worst = 0.0
    print(" ranks  EP  ZeRO  accumulated     order     terms  grad norm  gradients")
    for line in lines:
        if "split" not in line:
            continue
        split, values = line["split"], line["values"]
        accumulation, order = split["accumulation"], "reversed" if split["reversed_packs"] else "as drawn"
        reference = references.setdefault(accumulation if coupled else 0, values)
        norms = [name for name in values if name.startswith("grad_norm")]
        terms = largest_difference(reference, values, [name for name in values if name not in norms])
        if coupled:
            terms = max(terms, largest_difference(first, values, linear_terms(values)))
        found = [terms, largest_difference(reference, values, norms), tuple(line["gradients"])]
        shown = "".join(f"{difference:11.1e}" for difference, _ in found)
        print(f"{split['ranks']:6}{split['ep_size']:4}{split['zero_stage']:6}{accumulation:13}{order:>10}{shown}")
        worst = max(worst, *(difference for difference, _ in found))
        for difference, name in found:
            if difference > _TOLERANCE:
                print(f"      differs: {name}")
    verdict = "ok" if worst <= _TOLERANCE else "FAILED"
    print(f"largest relative difference {worst:.1e}, tolerance {_TOLERANCE:.0e}: {verdict}")
    if coupled:
        print("terms that couple samples depend on the micro-step: compared only for equal accumulation")
    faults = [fault for line in lines for fault in line.get("faults", [])]
    for fault in faults:
        print(f"FAULT: {fault}")
    if not faults:
        print("no silent faults: balancing terms reach every router, padding is in no statistic,")
        print("evaluation is deterministic, only the experts are marked as experts")
    return worst <= _TOLERANCE and not faults


def largest_difference(reference: dict[str, float], other: dict[str, float], names: Iterable[str]) -> tuple[float, str]:
    """The largest relative difference of the named values, and its name.

    For values below 1e-3 the difference is relative to 1e-3, because they are differences of larger numbers.
    """
    differences = ((abs(other[name] - reference[name]) / max(abs(reference[name]), 1e-3), name) for name in names)
    return max(differences, default=(0.0, ""))


def largest_gradient_difference(reference: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The largest `||other - reference|| / ||reference||` of a parameter's gradient, and its name.

    The divisor is at least 1e-6 of the whole gradient's norm: a smaller gradient is the rounding error of 0.
    """
    assert reference.keys() == other.keys()
    norms = {name: float(gradient.double().norm()) for name, gradient in reference.items()}
    least = 1e-6 * math.hypot(*norms.values())
    differences = {name: float((other[name].double() - value.double()).norm()) for name, value in reference.items()}
    return max((difference / max(norms[name], least), name) for name, difference in differences.items())


def couples_micro_steps(recipe: Recipe) -> bool:
    """Whether terms are defined over the micro-step, so that only splits of equal accumulation can be compared."""
    retrieval, moe = recipe.tasks.retrieval, recipe.moe
    contrast = retrieval.weight > 0 and not retrieval.gradient_cache
    return contrast or moe.global_entropy_weight > 0 or moe.mutual_information_weight > 0


def linear_terms(names: Iterable[str]) -> list[str]:
    """The first step's terms that are the same for every accumulation, in any recipe."""
    coupled = ("loss,", "loss_retrieval", "global_entropy", "mutual_information", "grad_norm")
    return [name for name in names if name.endswith("step 0") and not name.startswith(coupled)]
