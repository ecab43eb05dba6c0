# Sourced by the run scripts: the settings they share, and the launch. Each of them sets, before that:
#   ENGINE   what is run, for the name of the output folder
#   CONFIG   accelerate's configuration, a name from accelerate_configs/
# and, where it uses DeepSpeed, ZERO, a name from deepspeed_configs/. Every setting is an environment variable; flags at the
# end of the command line go to train.py, and the last one wins.

HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
. "$ROOT/scripts/setup_env.sh"

"$PYTHON" -S "$HERE/settings.py" "$ROOT" "$ENGINE"

GPUS=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())')
ON_CPU=$([ "$GPUS" -gt 0 ] && echo False || echo True)

# What to train, and on how many processes.
MODEL=${MODEL:-$HERE/default/model}
DATASET=${DATASET:-$HERE/default/data}
SPLITS=${SPLITS:-train,test}
NUM_PROCESSES=${NUM_PROCESSES:-$([ "$GPUS" -gt 0 ] && echo "$GPUS" || echo 2)}  # in total, over all machines
NUM_MACHINES=${NUM_MACHINES:-1}
MACHINE_RANK=${MACHINE_RANK:-0}
MAIN_PROCESS_IP=${MAIN_PROCESS_IP:-}
MAIN_PROCESS_PORT=${MAIN_PROCESS_PORT:-$([ "$NUM_MACHINES" -gt 1 ] && echo 29500 || echo 0)}  # 0: any free one
FULL=${FULL:-0}                                    # 1: all weights instead of LoRA adapters
case $FULL in
    1) LORA=False MODE=full ;;
    0) LORA=True MODE=lora ;;
    *) echo "FULL: 0 (LoRA) or 1 (all weights) is allowed, got $FULL" >&2; exit 2 ;;
esac
[ "${QLORA:-0}" = 1 ] || ENGINE=$ENGINE${ZERO:+-$ZERO}-$MODE  # a folder for each kind of run
SEQUENCE_PARALLEL=${SEQUENCE_PARALLEL:-1}          # processes that share each sequence, or {"size": 4, "mode": "ring"}
[ "$SEQUENCE_PARALLEL" = 1 ] || ENGINE=$ENGINE-sp
OUTPUT_DIR=${OUTPUT_DIR:-outputs/sft-$ENGINE}

# The engine. "mini_sequence" is a section of accelerate's YAML, or of the DeepSpeed JSON.
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$ROOT/accelerate_configs/$CONFIG.yaml}
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-${ZERO:+$ROOT/deepspeed_configs/$ZERO.json}}
if [ "$SEQUENCE_PARALLEL" != 1 ]; then  # copies of the two, with this setting
    COPIES=$(mktemp -d)
    trap 'rm -rf "$COPIES"' EXIT
    "$PYTHON" "$HERE/configure.py" "$COPIES" "sequence_parallel=$SEQUENCE_PARALLEL" "$ACCELERATE_CONFIG" "$DEEPSPEED_CONFIG"
    ACCELERATE_CONFIG=$COPIES/$(basename "$ACCELERATE_CONFIG")
    DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:+$COPIES/$(basename "$DEEPSPEED_CONFIG")}
fi

# The embedded default is small and learns from scratch; a real model wants the settings of PEFT's and MST's recipes.
if [ "$MODEL" = "$HERE/default/model" ]; then
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_DISABLE_PROGRESS_BARS=1  # it is loaded in a second
    LEARNING_RATE=${LEARNING_RATE:-3e-3}
    LORA_MODULES_TO_SAVE=${LORA_MODULES_TO_SAVE-embed_tokens,lm_head}  # a random base has nothing to adapt there
    MAX_LENGTH=${MAX_LENGTH:-2048}
    MAX_STEPS=${MAX_STEPS:-${NUM_TRAIN_EPOCHS:+-1}}
    MAX_STEPS=${MAX_STEPS:-20}
    PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-2}
    GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-2}
    LOGGING_STEPS=${LOGGING_STEPS:-1}
    EVAL_STRATEGY=${EVAL_STRATEGY:-no}
    SAVE_STRATEGY=${SAVE_STRATEGY:-no}
fi
LEARNING_RATE=${LEARNING_RATE:-1e-4}
MAX_LENGTH=${MAX_LENGTH:-8192}
MAX_STEPS=${MAX_STEPS:--1}                         # -1: NUM_TRAIN_EPOCHS decides
NUM_TRAIN_EPOCHS=${NUM_TRAIN_EPOCHS:-1}
PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-1}
GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-4}
LOGGING_STEPS=${LOGGING_STEPS:-5}
EVAL_STRATEGY=${EVAL_STRATEGY:-epoch}
SAVE_STRATEGY=${SAVE_STRATEGY:-epoch}
PACKING=${PACKING:-False}
LORA_R=${LORA_R:-8}
LORA_ALPHA=${LORA_ALPHA:-16}
LORA_DROPOUT=${LORA_DROPOUT:-0.1}
LORA_TARGET_MODULES=${LORA_TARGET_MODULES:-all-linear}
LORA_MODULES_TO_SAVE=${LORA_MODULES_TO_SAVE:-}     # trained in full beside the adapters, e.g. embed_tokens,lm_head
CHAT_TEMPLATE=${CHAT_TEMPLATE:-none}               # chatml, zephyr, or none for the tokenizer's own
SEED=${SEED:-100}
RESUME=${RESUME:-}                                 # last, or a checkpoint's folder
USE_FLASH_ATTN=${USE_FLASH_ATTN:-$("$PYTHON" -c 'import importlib.util as u, torch; print(torch.cuda.is_available() and u.find_spec("flash_attn") is not None)')}

if [ "$ON_CPU" = True ]; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
fi

# A 4-bit base (QLoRA): stored in the compute dtype, or FSDP and ZeRO-3 could not cut it into shards.
if [ "${QLORA:-0}" = 1 ]; then
    [ "$FULL" != 1 ] || { echo "FULL=1: a quantized base cannot be trained in full; leave FULL out" >&2; exit 2; }
    QUANT_DTYPE=${QUANT_DTYPE:-$([ "$ON_CPU" = True ] && echo float32 || echo bfloat16)}
    set -- --use_4bit_quantization True --use_nested_quant True --dtype "$QUANT_DTYPE" \
        --bnb_4bit_compute_dtype "$QUANT_DTYPE" --bnb_4bit_quant_storage_dtype "$QUANT_DTYPE" "$@"
fi

"$PYTHON" "$HERE/launch.py" --config_file "$ACCELERATE_CONFIG" ${DEEPSPEED_CONFIG:+--deepspeed_config_file "$DEEPSPEED_CONFIG"} \
    --num_processes "$NUM_PROCESSES" --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK" \
    ${MAIN_PROCESS_IP:+--main_process_ip "$MAIN_PROCESS_IP"} --main_process_port "$MAIN_PROCESS_PORT" \
    "$HERE/train.py" \
    --model_name_or_path "$MODEL" --dataset_name "$DATASET" --splits "$SPLITS" --chat_template_format "$CHAT_TEMPLATE" \
    --output_dir "$OUTPUT_DIR" --seed "$SEED" ${RESUME:+--resume_from_checkpoint "$RESUME"} \
    --max_length "$MAX_LENGTH" --packing "$PACKING" \
    --num_train_epochs "$NUM_TRAIN_EPOCHS" --max_steps "$MAX_STEPS" \
    --per_device_train_batch_size "$PER_DEVICE_BATCH_SIZE" --per_device_eval_batch_size "$PER_DEVICE_BATCH_SIZE" \
    --gradient_accumulation_steps "$GRADIENT_ACCUMULATION_STEPS" \
    --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --weight_decay 1e-4 --max_grad_norm 1.0 \
    --gradient_checkpointing True --use_reentrant False --use_flash_attn "$USE_FLASH_ATTN" \
    --use_peft_lora "$LORA" --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" --lora_dropout "$LORA_DROPOUT" \
    --lora_target_modules "$LORA_TARGET_MODULES" ${LORA_MODULES_TO_SAVE:+--lora_modules_to_save "$LORA_MODULES_TO_SAVE"} \
    --logging_steps "$LOGGING_STEPS" --eval_strategy "$EVAL_STRATEGY" --save_strategy "$SAVE_STRATEGY" --report_to none \
    "$@"
