#!/bin/sh
# QLoRA with mini-sequences under FSDP2: a frozen base in 4 bits, in shards, and LoRA adapters.
# Needs bitsandbytes: pip install 'ds_minis[quantization]'
#
#   sh run_peft_qlora_fsdp.sh                         the embedded default: a small Llama, offline, on GPUs or 2 CPU processes
#   MODEL=meta-llama/Llama-3.1-70B DATASET=HuggingFaceH4/ultrachat_200k SPLITS=train_sft,test_sft NUM_PROCESSES=2 \
#       MAX_LENGTH=32768 sh run_peft_qlora_fsdp.sh    the same on real hardware
set -eu

ENGINE=qlora-fsdp
CONFIG=fsdp
QLORA=1
LORA_MODULES_TO_SAVE=${LORA_MODULES_TO_SAVE:-}      # adapters alone
. "$(dirname "$0")/launch.sh"
