#!/bin/sh
# Runs a recipe of this folder, by its name:
#
#   sh run.sh                             the list
#   sh run.sh llama-3.1-8b-32k            trains, with the model and data that the recipe names
#   sh run.sh llama-3.1-8b-32k --plan     what `ds-minis plan` says of it: will it fit? No GPU, no weights
#   sh run.sh llama-3.1-8b-32k --show     the command alone
#   sh run.sh llama-3.1-8b-32k --tiny     two steps of the model's tiny twin on the embedded data, offline, on CPUs
#   sh run.sh llama-3.1-8b-32k --max_length 16384 --output_dir out     any flag of train.py, last wins
set -eu

HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
. "$ROOT/scripts/setup_env.sh"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

exec "$PYTHON" "$HERE/recipe.py" "$@"
