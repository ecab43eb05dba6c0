#!/bin/sh
# Runs every test; sets the environment up first where that is needed.
#   sh scripts/run_tests.sh                 lint, unit tests, then the real engines in two processes
#   sh scripts/run_tests.sh -k loss         any pytest arguments
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
# One thread: the tensors of the tests are small, and threads that wait for each other cost more than they do.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

if [ "$#" -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pytest -m "not engine and not large" -n auto --maxprocesses 4 --dist loadfile
"$PYTHON" -m pytest -m "large and not engine"
"$PYTHON" -m pytest -m engine
