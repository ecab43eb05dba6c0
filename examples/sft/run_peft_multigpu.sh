#!/bin/sh
# Fine-tunes a model with mini-sequences under plain data parallelism (DDP), LoRA by default: each GPU holds the whole model.
#
#   sh run_peft_multigpu.sh                           the embedded default: a small Llama, offline, on GPUs or 2 CPU processes
#   MODEL=meta-llama/Llama-3.1-8B DATASET=HuggingFaceH4/ultrachat_200k SPLITS=train_sft,test_sft NUM_PROCESSES=8 \
#       MAX_LENGTH=32768 sh run_peft_multigpu.sh      the same on real hardware
#   FULL=1 sh run_peft_multigpu.sh                    all weights
set -eu

ENGINE=multigpu
CONFIG=ddp
. "$(dirname "$0")/launch.sh"
