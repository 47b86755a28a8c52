#!/usr/bin/env bash
# One call, under nine minutes, for a bare machine with one GPU, torch 2.11 or newer and no network:
#   bash benchmarks/gpu.sh [OUTPUT_FOLDER]        (default: benchmarks/results)
# Pure-Python packages that the machine lacks (deepspeed, hjson, py-cpuinfo, webdataset, ...) may lie as wheels in .whl/.
# Runs the GPU parity tests, moe_layer, and train_step on a recipe of about one billion parameters; writes gpu_*.json and a log.
# DSMOE_VL_COMMIT names the commit where the machine has a copy without git.
# With DRY_RUN=cpu the same commands run small on a CPU, to check this script; their figures go to a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${DRY_RUN:-}" = cpu ] && default="$(mktemp -d)" || default=benchmarks/results
output="${1:-$default}"
mkdir -p "$output"
python="${PYTHON:-python3}"
if compgen -G ".whl/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
step() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }
bench() { # NAME SECONDS_AT_MOST SCRIPT ARGUMENTS...
  local name="$1" limit="$2" script="$3"; shift 3
  step "$script: $name"
  timeout "$limit" "$python" "benchmarks/$script.py" --json "$output/gpu_$name.json" "$@" || echo "FAILED: $name"
}

step "machine"
"$python" - <<'PY'
import deepspeed, torch
print("torch", torch.__version__, "deepspeed", deepspeed.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
PY

step "parity tests"
timeout 240 "$python" -m pytest -q -p no:cacheprovider -o timeout=0 tests/parity tests/gpu 2>&1 | tail -n 40 || true

if [ "${DRY_RUN:-}" = cpu ]; then
  bench dry_run_layer 60 moe_layer --tokens 64 --turns 1 --bf16
  bench dry_run 120 train_step --steps 2 --micro-batch 1 data.pack_length=128 data.pack_patches=256
  exit 0
fi
bench moe_layer 90 moe_layer --bf16 --tokens 4096 16384 --turns 10
bench base_zero2 150 train_step --recipe launch/recipes/base.toml --micro-batch 4 --steps 15
bench base_zero3 120 train_step --recipe launch/recipes/base.toml --deepspeed ds_configs/moe_zero3.json --micro-batch 4 --steps 10 --no-profile
step "done: $output"
