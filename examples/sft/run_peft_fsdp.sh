#!/bin/sh
# Fine-tunes a model with mini-sequences under FSDP, LoRA by default: weights, gradients and optimizer states in shards.
#
#   sh run_peft_fsdp.sh                               the embedded default: a small Llama, offline, on GPUs or 2 CPU processes
#   MODEL=meta-llama/Llama-3.1-8B DATASET=HuggingFaceH4/ultrachat_200k SPLITS=train_sft,test_sft NUM_PROCESSES=8 \
#       MAX_LENGTH=32768 sh run_peft_fsdp.sh          the same on real hardware
#   FULL=1 sh run_peft_fsdp.sh                        all weights
#   FSDP_VERSION=1 sh run_peft_fsdp.sh                FSDP1 instead of FSDP2
set -eu

case ${FSDP_VERSION:-2} in
    2)
        ENGINE=fsdp CONFIG=fsdp
        ;;
    1)
        ENGINE=fsdp1 CONFIG=fsdp1
        LORA_MODULES_TO_SAVE=${LORA_MODULES_TO_SAVE:-}  # train.py says why the LM head cannot be one of them
        ;;
    *)
        echo "FSDP_VERSION: 1 or 2 is allowed, got $FSDP_VERSION" >&2
        exit 2
        ;;
esac
unset FSDP_VERSION  # accelerate reads a variable of this name, and has the version from its configuration
. "$(dirname "$0")/launch.sh"
