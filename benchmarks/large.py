"""Does a large model start, train, save and resume in a host's memory? `large.toml` cut to two layers, on two ranks.

    python benchmarks/large.py [--json FILE] [section.key=value ...]      (five minutes on two cores; 20 GiB of memory)

All widths and the 128 experts are kept; layers are one dense and one sparse one, and three of the vision encoder.
ZeRO-3 on a CPU, fp32 where bf16 has no unit. Memory is what all processes of the run have together, each shared page
once (PSS), asked every half second. Needs the quickstart's shards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, Result

_SETTINGS = (
    "model.layers=2", "model.vision.layers=3", 'data.sources=[{name="images", path="data/synthetic/images_train"}]',
    "data.evaluation=[]", "tokenizer.path=data/synthetic/tokenizer.model", "data.pack_length=256",
    "data.pack_patches=512", "data.image_max_patches=64", "data.frame_max_patches=64", "data.video_frames=4",
    "data.workers=0", "data.lanes=8", "data.lookahead=16", "run.log_every=1", "run.samples_every=0",
    "run.evaluate_every=0",
)  # fmt: skip
# One sub-group and one bucket take less than a matrix of the experts.
_ZERO = {"stage": 3, "sub_group_size": 50_000_000, "reduce_bucket_size": 20_000_000}
_STEPS, _MORE = 3, 2
_GIB = 2**30


def pss(folder: Path) -> int:
    """Bytes of all processes whose command line names the folder."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
        except OSError:  # it has ended
            continue
    return total


def train(steps: int, run: Path, deepspeed: Path, overrides: list[str]) -> int:
    """Train to a step; the peak of memory, bytes. Raises SystemExit with the status of a run that fails."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning", "--num_accelerators", "2"]
    launcher += ["--master_port", port]
    script = ["launch/train.py", "--deepspeed", str(deepspeed), "--recipe", "launch/recipes/large.toml"]
    settings = [*_SETTINGS, f"run.steps={steps}", f"run.checkpoint_every={_STEPS}", *overrides]
    with subprocess.Popen(
        [*launcher, *script, "--run-dir", str(run), *settings], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, pss(run))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Figures of a run and of the one that goes on from its checkpoint."""
    config = json.loads((ROOT / "ds_configs/moe_zero3.json").read_text())
    config |= {"gradient_accumulation_steps": 1, "zero_optimization": _ZERO}
    config["expert_parallel"]["autoep_size"] = 2
    del config["activation_checkpointing"]
    (folder / "deepspeed.json").write_text(json.dumps(config))
    run = folder / "run"
    peaks = [train(steps, run, folder / "deepspeed.json", overrides) for steps in (_STEPS, _STEPS + _MORE)]
    plan = json.loads((run / "plan.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "parameters": plan["parameters"]["total"],
        **{name: plan[name] for name in ("device", "world_size", "ep_size", "zero_stage", "precision")},
        "losses": [line["loss"] for line in lines if "loss" in line],
        "peak_gib": {"start, three steps and a save": peaks[0] / _GIB, "resumed for two more": peaks[1] / _GIB},
    }


def main() -> int:
    """Train twice, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write a result file (record.py)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="recipe settings to replace")
    args = parser.parse_intermixed_args()
    folder = Path(tempfile.mkdtemp(prefix="large_"))
    try:
        figures = measure(folder, args.overrides)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for phase, peak in figures["peak_gib"].items():
        print(f"{figures['parameters'] / 1e6:.0f} M parameters, {phase}: {peak:.1f} GiB in all processes")
    if args.json:
        Result.now("large", figures).write(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
