#!/bin/sh
# One machine's part of one stage: launch_training.sh and launch_training.slurm start it, on each machine.
#   NUM_MACHINES=2 MACHINE_RANK=1 MAIN_PROCESS_IP=HOST MAIN_PROCESS_PORT=29500 sh scripts/launch_stage.sh configs/NAME/STAGE
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=$1
. "$FOLDER/stage.env"
cd "$ROOT"
. "$ROOT/scripts/setup_env.sh"
if [ "$DEVICE" = cpu ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
fi
exec "$PYTHON" examples/sft/launch.py --config_file "$FOLDER/accelerate.yaml" --num_processes "$NUM_PROCESSES" \
    --num_machines "${NUM_MACHINES:-1}" --machine_rank "${MACHINE_RANK:-0}" --main_process_ip "${MAIN_PROCESS_IP:-127.0.0.1}" \
    --main_process_port "${MAIN_PROCESS_PORT:-0}" examples/sft/train.py "$FOLDER/train.yaml"
