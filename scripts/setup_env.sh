# Sourced by the run scripts: sets $PYTHON to a Python that has ds_minis and everything the examples and tests import.
# The caller sets ROOT to the repository's folder. An active environment that is complete is used as it is; otherwise one
# is made in $ROOT/.venv, with the versions of constraints.txt.
#   PYTHON=/path/to/python   use that one (nothing is installed into it)

if [ -z "${PYTHON:-}" ]; then
    complete="import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, 'ds_minis deepspeed accelerate peft trl datasets bitsandbytes pytest xdist ruff importlinter matplotlib PIL mkdocs material tensorboard'.split())))"
    PYTHON=python3
    if ! "$PYTHON" -c "$complete" 2>/dev/null; then
        PYTHON=$ROOT/.venv/bin/python
        if [ ! -x "$PYTHON" ]; then
            echo "python3 has not all that the examples and tests import: making $ROOT/.venv" >&2
            python3 -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
            python3 -m venv "$ROOT/.venv"
        fi
        if ! "$PYTHON" -c "$complete" 2>/dev/null; then
            # torch first and alone: with it in place nothing below asks for another build of it.
            echo "1 of 2: installing torch (some 200 MB, or several GB with CUDA)" >&2
            "$PYTHON" -m pip install -q -c "$ROOT/constraints.txt" torch
            echo "2 of 2: installing transformers, deepspeed, trl and what else the examples and tests import" >&2
            "$PYTHON" -m pip install -q -c "$ROOT/constraints.txt" -e "$ROOT[deepspeed,sft,quantization,test]"
            echo "installed in $ROOT/.venv" >&2
        fi
    fi
elif ! command -v "$PYTHON" >/dev/null; then
    echo "PYTHON=$PYTHON: there is no such program; give a Python that has ds_minis, or leave PYTHON out" >&2
    exit 2
else
    "$PYTHON" -c '
import importlib.util as u, os, sys
missing = [name for name in "ds_minis torch transformers accelerate peft trl datasets".split() if u.find_spec(name) is None]
if missing:
    print("PYTHON=" + os.environ.get("PYTHON", sys.executable) + ": it lacks " + ", ".join(missing) + "; leave PYTHON out, and an environment is made", file=sys.stderr)
sys.exit(2 if missing else 0)'
fi
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
export PATH
