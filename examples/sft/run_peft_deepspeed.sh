#!/bin/sh
# Fine-tunes a model with mini-sequences under DeepSpeed, LoRA by default.
#
#   sh run_peft_deepspeed.sh                          the embedded default: a small Llama, offline, on GPUs or 2 CPU processes
#   MODEL=meta-llama/Llama-3.1-8B DATASET=HuggingFaceH4/ultrachat_200k SPLITS=train_sft,test_sft NUM_PROCESSES=8 \
#       MAX_LENGTH=32768 sh run_peft_deepspeed.sh     the same on real hardware
#   FULL=1 ZERO_STAGE=3 sh run_peft_deepspeed.sh      all weights, ZeRO-3
#   ZERO_STAGE=3_offload sh run_peft_deepspeed.sh     any name of deepspeed_configs/zero*.json
#   sh run_peft_deepspeed.sh --learning_rate 1e-5     any flag of train.py or TRL's SFTConfig, last wins
set -eu

ENGINE=deepspeed
ZERO=zero${ZERO_STAGE:-2}
case $ZERO in
    *3*) CONFIG=zero3 ;;
    *) CONFIG=zero2 ;;
esac
. "$(dirname "$0")/launch.sh"
