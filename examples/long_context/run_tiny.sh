#!/bin/sh
# A needle in a haystack of 2,048 tokens, from nothing: trains a tiny model from 64 tokens on, in 2 CPU processes that share each
# sequence, once with RoPE's base from the schedule and once with it left fixed, and draws what each of them finds.
#
#   sh run_tiny.sh                        4 min 43 s on 2 idle cores; pictures and models in outputs/tiny-needle
#   SEED=1 OUTPUT_DIR=out sh run_tiny.sh  other weights, text and tests
#   SCALE=0.02 sh run_tiny.sh             a trial of all parts, which learns nothing
set -eu

HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
. "$ROOT/scripts/setup_env.sh"

OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny-needle}
NUM_PROCESSES=${NUM_PROCESSES:-2}   # they share each sequence
SEED=${SEED:-0}
SCALE=${SCALE:-1}                   # of the number of training steps
LENGTHS=${LENGTHS:-64,256,512,768,1024,1280,1536,1792,2048}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_VISIBLE_DEVICES=

launch() {
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_PROCESSES" "$@"
}

launch "$HERE/train_tiny.py" "$OUTPUT_DIR" --seed "$SEED" --scale "$SCALE" --lengths "$LENGTHS"

# What the command says of the two models that were saved.
for WAY in growing fixed; do
    launch "$ROOT/scripts/needle.py" "$OUTPUT_DIR/$WAY" --lengths "$LENGTHS" --depths 0,0.25,0.5,0.75,1 --num-samples 4 \
        --batch-size 4 --rnd-number-digits 4 --haystack "$OUTPUT_DIR/test.txt" --seed 1 \
        --output "$OUTPUT_DIR/$WAY.json" --overwrite "$@"
done

plot() {
    "$PYTHON" -m ds_minis.cli needle-plot "$@"
}

plot "$OUTPUT_DIR/growing.json" "$OUTPUT_DIR/fixed.json" --output "$OUTPUT_DIR/ablation.png" \
    --titles "RoPE theta from the schedule" "RoPE theta left at 100" --title "A tiny model, trained from 64 to 2,048 tokens"
plot "$OUTPUT_DIR/growing-0.json,$OUTPUT_DIR/fixed-0.json" "$OUTPUT_DIR/growing-1.json,$OUTPUT_DIR/fixed-1.json" \
    "$OUTPUT_DIR/growing-2.json,$OUTPUT_DIR/fixed-2.json" "$OUTPUT_DIR/growing-3.json,$OUTPUT_DIR/fixed-3.json" \
    --output "$OUTPUT_DIR/training.gif" --titles "RoPE theta from the schedule" "RoPE theta left at 100" \
    --frame-titles "trained at 64 tokens" "then at 256 tokens" "then at 1,024 tokens" "then at 2,048 tokens"
