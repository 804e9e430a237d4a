# shellcheck shell=bash
# What the batch scripts beside this file share: a training that fills a Slurm job, stops in time and goes on later.
# They source it and call its functions.

: "${SAVE:?names the folder of the checkpoints: SAVE=DIR TRAIN_ITERS=N sbatch ...}"
: "${TRAIN_ITERS:?is the last iteration of the training: SAVE=DIR TRAIN_ITERS=N sbatch ...}"

# The iteration that was saved last; nothing if there is none.
saved_iteration() {
    cat "$SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || true
}

is_finished() {
    [ "$(saved_iteration)" = "$TRAIN_ITERS" ]
}

was_signalled=false
started_at=$(saved_iteration)

# Trains on all nodes of the job until the end, an error or a signal: train [flags of finetune.py]
# The status is srun's: 0 at the end and after a stop that a signal asked for.
train() {
    local nodes step status is_interrupted=true
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local host=${RENDEZVOUS_HOST:-${nodes%%$'\n'*}}
    local port=${RENDEZVOUS_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that meet on a node need different ones
    # Slurm signals every process of a step. torchrun would answer by ending finetune.py after 30 seconds, saved or not,
    # and fail; so it is started with the signals ignored, and finetune.py takes them by --exit_signal_handler.
    # A step gets one core of each node unless it asks for more.
    # shellcheck disable=SC2086 # SRUN_ARGS are several words
    srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" ${SRUN_ARGS:-} \
        bash -c 'trap "" USR1 TERM; exec "$@"' bash \
        torchrun --signals_to_handle=SIGINT,SIGHUP,SIGQUIT \
        --nnodes="$SLURM_NNODES" --nproc_per_node="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
        --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:$port" \
        finetune.py --save "$SAVE" --train_iters "$TRAIN_ITERS" --auto_resume --exit_signal_handler "$@" &
    step=$!
    trap 'is_interrupted=true was_signalled=true; kill -USR1 "$step" || true' USR1 # srun hands it on, unless it ended
    while $is_interrupted; do                                                      # by the trap: `wait` ended first
        is_interrupted=false status=0
        wait "$step" || status=$?
    done
    trap 'was_signalled=true' USR1 # there is no step any more
    return "$status"
}

# Puts the job back into the queue if it stopped before the last iteration. Slurm then ends it.
# Stops that nobody asked this script for (SIGTERM to the step, --exit_duration_in_mins) count if something was saved.
requeue_if_unfinished() {
    if ! is_finished && { $was_signalled || [ "$(saved_iteration)" != "$started_at" ]; }; then
        echo "stopped at iteration $(saved_iteration) of $TRAIN_ITERS: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
