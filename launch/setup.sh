#!/usr/bin/env bash
# Creates .venv with the tested versions, once. Usage: bash launch/setup.sh [test, or other extras of pyproject.toml]
# Everything is installed in .venv; delete the folder to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:+[$1]}"
stamp=".venv/.installed-${1:-run}"
wanted="$(cat constraints.txt pyproject.toml | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python=""
for candidate in python3.11 python3.12 python3.13 python3; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
done
[ -n "$python" ] || { echo "error: Python 3.11 or newer is needed; install it, then run this again" >&2; exit 1; }
command -v c++ >/dev/null || command -v g++ >/dev/null || {
  echo "error: a C++ compiler is needed, because DeepSpeed builds its CPU communication on first use; install g++" >&2
  exit 1
}

echo "setup: installing into .venv with $("$python" --version)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check)
# Without an NVIDIA GPU the CPU build of torch, if available, is enough and saves gigabytes of CUDA packages.
if [ -e /proc/driver/nvidia ] || command -v nvidia-smi >/dev/null; then
  "${pip[@]}" install -c constraints.txt torch
else
  torch="$(grep '^torch==' constraints.txt)"
  "${pip[@]}" install "$torch+cpu" 2>/dev/null || "${pip[@]}" install -c constraints.txt torch
fi
# DeepSpeed's build imports torch, so it cannot run in an isolated environment.
"${pip[@]}" install -c constraints.txt setuptools wheel ninja numpy
"${pip[@]}" install -c constraints.txt --no-build-isolation deepspeed
"${pip[@]}" install -c constraints.txt -e ".$extras"
if ! command -v nvidia-smi >/dev/null; then
  echo "setup: building DeepSpeed's CPU communication (some 30 seconds)"
  PATH="$PWD/.venv/bin:$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions" .venv/bin/python -c '
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()' >/dev/null 2>&1 ||
    echo "setup: the build failed; training will try again and print the reason" >&2
fi
echo "$wanted" > "$stamp"
echo "setup: done"
