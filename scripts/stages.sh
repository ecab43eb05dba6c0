# Sourced by launch_training.sh and launch_training.slurm: which stages there are, which are done, where their logs go.
# The caller sets ROOT to the repository's folder and CONFIGS to a folder that create_config.py has written.

STOPPED=75  # of train.py: a checkpoint was saved, as it was asked to, before the last step

if [ ! -f "$CONFIGS/stages" ]; then
    echo "$CONFIGS has no file \`stages\`: make it by python scripts/create_config.py RECIPE.yaml" >&2
    exit 2
fi

# Reads a stage's variables. $1: its folder's name.
read_stage() {
    FOLDER=$CONFIGS/$1
    INDEX=${1#config_}
    INDEX=${INDEX%%_*}
    . "$FOLDER/stage.env"
    LOGS=$CHECKPOINTS/logs
    DONE=$CHECKPOINTS/stage_$INDEX.done
}

# Whether the stage that was read is done; stops where that was with other settings.
is_done() {
    [ -f "$DONE" ] || return 1
    [ "$(cat "$DONE")" = "$(fingerprint)" ] && return 0
    echo "stage $INDEX: $DONE is of other settings than $FOLDER/train.yaml: remove it to run the stage again, or choose another" \
        "checkpoints_path" >&2
    exit 2
}

fingerprint() {
    cksum < "$FOLDER/train.yaml"
}

# Notes that a stage is done, or says what to do, and gives the exit status back. $1: the exit status; $2: where its logs are.
finish_stage() {
    case $1 in
        0) fingerprint > "$DONE"; echo "stage $INDEX: done" ;;
        "$STOPPED") echo "stage $INDEX: stopped after it saved a checkpoint; start again to continue ($2)" >&2 ;;
        *) echo "stage $INDEX: failed with exit status $1; the stages after it do not run; start again to continue with it ($2)" >&2 ;;
    esac
    return "$1"
}

# Runs a command until it ends. SIGUSR1, a time limit's, asks the training to save a checkpoint and to stop; other signals are
# passed on.
run_with_signals() {
    rm -f "$STOP_FILE"
    "$@" &
    CHILD=$!
    trap 'echo "stage $INDEX: asked to save a checkpoint and to stop" >&2; : > "$STOP_FILE"' USR1
    trap 'kill -TERM "$CHILD"' TERM INT HUP
    STATUS=0
    wait "$CHILD" || STATUS=$?
    while kill -0 "$CHILD" 2>/dev/null; do  # `wait` ends with each trap
        STATUS=0
        wait "$CHILD" || STATUS=$?
    done
    trap - USR1 TERM INT HUP
    return "$STATUS"
}
