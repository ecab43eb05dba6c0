#!/bin/sh
# Runs the stages of a long-context extension one after the other on this machine, without Slurm, with as many processes as
# launch_training.slurm would start on all machines. A stage that is done is left out: after a failure, start it again.
#   sh scripts/launch_training.sh configs/1M_4stages
#   DRY_RUN=1 sh scripts/launch_training.sh configs/1M_4stages       prints what would be run
#   kill -USR1 PID                                                   saves a checkpoint and stops
set -eu

ROOT=$(cd "$(dirname "$0")/.." && pwd)
CONFIGS=${1:-$ROOT/configs/1M_4stages}
CONFIGS=$(cd "$CONFIGS" 2>/dev/null && pwd || echo "$CONFIGS")
. "$ROOT/scripts/stages.sh"
cd "$ROOT"

# A stage with a log file that is shown while it is written.
run_stage() {
    LOG=$LOGS/stage_${INDEX}_node_0.log
    : > "$LOG"
    tail -f "$LOG" &
    TAIL=$!
    STATUS=0
    run_with_signals sh -c 'exec sh "$1" "$2" > "$3" 2>&1' sh "$ROOT/scripts/launch_stage.sh" "$FOLDER" "$LOG" || STATUS=$?
    sleep 1
    kill "$TAIL" 2>/dev/null || :
    wait "$TAIL" 2>/dev/null || :
    finish_stage "$STATUS" "$LOG"
}

while read -r STAGE <&3; do
    read_stage "$STAGE"
    if is_done; then
        echo "stage $INDEX: was done before"
    elif [ "${DRY_RUN:-0}" = 1 ]; then
        echo "stage $INDEX: sh $ROOT/scripts/launch_stage.sh $FOLDER    # $NUM_PROCESSES processes, log $LOGS/stage_${INDEX}_node_0.log"
    else
        mkdir -p "$LOGS"
        echo "stage $INDEX: $STAGE, $NUM_PROCESSES processes, $SEQUENCE_PARALLEL of them share a sequence"
        run_stage || exit $?
    fi
done 3< "$CONFIGS/stages"
