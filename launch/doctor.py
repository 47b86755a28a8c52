"""Examine a recipe: `python launch/doctor.py objective --recipe FILE [section.key=value ...]`.

`objective` runs the recipe on its own data with a small model, split in many ways over ranks, expert parallelism, ZeRO
stages, accumulation and packing order, and compares every loss term and gradient with those of one rank. It also looks
for faults that raise no error. CPU, two processes, some minutes. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Torch and DeepSpeed read these when they are imported.
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.errors import DsmoeVlError
from dsmoe_vl.parallel.ranks import Ranks

_ROOT = Path(__file__).resolve().parent.parent
_TOLERANCE = 1e-5
_TIME_LIMIT_SECONDS = 1800


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Examine a recipe.", allow_abbrev=False)
    parser.add_argument("subject", choices=["objective"])
    parser.add_argument("--recipe", type=Path, default=_ROOT / "launch/recipes/three_tasks.toml", metavar="TOML")
    parser.add_argument("--deepspeed", type=Path, default=_ROOT / "ds_configs/moe.json", metavar="JSON")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # makes this process one rank of the grid
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    return parser.parse_intermixed_args()


def examine(args: argparse.Namespace) -> None:
    """One rank's part: all splits of this world size; rank 0 writes what they came to. Raises DsmoeVlError.

    Gradients are compared here with those of the first split, which one rank leaves in a file for two.
    """
    import logging

    import torch

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    from dsmoe_vl.parallel.launch import HostGroup, start_process_group
    from dsmoe_vl.training.doctor import (
        Probe,
        Split,
        couples_micro_steps,
        largest_gradient_difference,
        shrink,
        silent_faults,
    )

    ranks = Ranks.discover()
    start_process_group(ranks, "cpu")
    recipe = shrink(load_recipe(args.recipe, args.overrides))
    coupled = couples_micro_steps(recipe)
    probe = Probe(recipe, load_deepspeed(args.deepspeed), ranks, HostGroup())
    gradients_file = args.results.with_name("gradients.pt")
    references = torch.load(gradients_file) if gradients_file.exists() else {}
    with args.results.open("w") if ranks.rank == 0 else open(os.devnull, "w") as file:
        if ranks.world_size == 1:
            file.write(json.dumps({"coupled": coupled, "faults": silent_faults(probe)}) + "\n")
        for split in Split.grid(ranks.world_size, (1, 2) if recipe.moe.backend == "capacity" else (1, 2, 3)):
            values, gradients = probe.run(split)
            reference = references.setdefault(split.accumulation if coupled else 0, gradients)
            line = {"split": asdict(split), "values": values}
            line["gradients"] = largest_gradient_difference(reference, gradients)
            file.write(json.dumps(line) + "\n")
            file.flush()
    if ranks.world_size == 1:
        torch.save(references, gradients_file)


def start_world(ranks: int, results: Path) -> int:
    """Run `examine` on that many ranks; the largest exit status. Raises TimeoutExpired where one hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--results", str(results)],
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
    """Print the table and the faults; whether all is well."""
    from dsmoe_vl.training.doctor import largest_difference, linear_terms

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
        print("terms that couple samples are defined over the micro-step: compared among splits of equal accumulation")
    faults = [fault for line in lines for fault in line.get("faults", [])]
    for fault in faults:
        print(f"FAULT: {fault}")
    if not faults:
        print("no silent faults: balancing terms reach every router, padding is in no statistic,")
        print("evaluation repeats itself, exactly the experts are marked as experts")
    return worst <= _TOLERANCE and not faults


def main() -> int:
    """Exit status 0 where all is well, 1 where it is not, 2 for a user's error."""
    args = parse()
    if args.results is not None:
        try:
            examine(args)
        except DsmoeVlError as error:
            if os.environ["RANK"] == "0":
                print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            results = Path(folder) / f"{ranks}.jsonl"
            print(f"running every split of {ranks} rank{'s' * (ranks > 1)}", flush=True)
            if status := start_world(ranks, results):
                return status
            lines += [json.loads(line) for line in results.read_text().splitlines()]
    return 0 if report(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
