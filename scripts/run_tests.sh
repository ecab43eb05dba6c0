#!/bin/sh
# Runs every test; sets the environment up first where that is needed.
#   sh scripts/run_tests.sh                 lint, unit tests and the real engines in two processes
#   sh scripts/run_tests.sh --quick         lint, the core's tests and one engine: three minutes
#   sh scripts/run_tests.sh -k loss         any pytest arguments
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/setup_env.sh"
cd "$ROOT"
# One thread: the tensors of the tests are small, and threads that wait for each other cost more than they do.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

lint() {
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -c "from importlinter.cli import lint_imports_command as lint; lint()"  # imports' direction (.importlinter)
}

QUICK="tests/config/test_config.py tests/convert/test_convert.py tests/loss/test_deferred_logits.py
    tests/layer/test_tiled_layer.py tests/loss/test_tiled_loss.py tests/core/test_tiled_op.py tests/modules/test_token_wise.py"
if [ "${1:-}" = --quick ]; then
    lint
    # One worker has the engine; the files of the core are for the others.
    exec "$PYTHON" -m pytest -n 2 --dist loadfile $QUICK \
        "tests/engines/test_engines.py::test_the_unconverted_models_parameters_or_its_refusal[ZeRO-3: full]"
elif [ "$#" -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
lint
# Whole files to each worker, for what its tests share; the longest first (tests/conftest.py).
"$PYTHON" -m pytest -m "not large" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=40
"$PYTHON" -m pytest -m large --durations=40
