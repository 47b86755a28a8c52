#!/usr/bin/env bash
# Sets up .venv where needed and runs every check: format, lint, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== pytest"
unset PYTHONDONTWRITEBYTECODE  # where it is set, every one of many hundred processes would compile this repository anew
# Two tests at a time, each file in one process: most of a test's time is the start of processes that use one core. Files
# are taken in the order of their names: sorted by number of tests, the long distributed ones would be left to the end.
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
