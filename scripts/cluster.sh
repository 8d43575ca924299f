# shellcheck shell=bash
# Sourced by the other cluster scripts, from the root of the checkout: loads the site settings and defines how to run
# sppctl.

if [ -f scripts/cluster.env ]; then
    # shellcheck source=/dev/null
    source scripts/cluster.env
fi
if [ -z "${SPPCTL_PYTHON:-}" ]; then
    SPPCTL_PYTHON=python3
    [ ! -x .venv/bin/python ] || SPPCTL_PYTHON=.venv/bin/python
fi
read -ra python <<< "$SPPCTL_PYTHON"  # several words if it runs in a container
# shellcheck disable=SC2034  # for the scripts that source this one
sppctl=("${python[@]}" -m sppctl)

# in_job COMMAND: runs COMMAND in every task of the job, then exits. If a signal ended it and its work was saved (143),
# the job is requeued, and the same command continues.
in_job() {
    local code=0 failed=.failed-$SLURM_JOB_ID
    # prefetch.sh has filled the cache, so dozens of processes need not query the hub
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-1}
    # srun does not inherit this from sbatch
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    rm -f "$failed"  # left by an earlier start of the same job that was killed
    srun --kill-on-bad-exit=1 scripts/slurm_task.sh "$failed" "$@" || code=$?
    if [ -f "$failed" ]; then
        code=$(cat "$failed")
        rm "$failed"
    elif [ "$code" = 143 ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
            echo "stopped by a signal; requeueing job $SLURM_JOB_ID" >&2
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "stopped by a signal after $SLURM_RESTART_COUNT restarts (MAX_RESTARTS); not requeued" >&2
        fi
    fi
    exit "$code"
}

# check_config ARGUMENTS: reports an invalid configuration, or a batch that the processes of the training cannot divide,
# now rather than later in a job
check_config() {
    "${sppctl[@]}" config "$@" launch.num_machines="${NODES:-1}" launch.num_processes="${GPUS_PER_NODE:-8}" > /dev/null
}

# job_options: sets `prune_options`, `train_options` and `eval_options` to the site's sbatch options
# shellcheck disable=SC2034
job_options() {
    local gpus=${GPUS_PER_NODE:-8}
    read -ra prune_options <<< "${PRUNE_OPTIONS:-}"
    read -ra train_options <<< "${TRAIN_OPTIONS:-}"
    read -ra eval_options <<< "${EVAL_OPTIONS:-}"
    train_options=(--nodes="${NODES:-1}" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" "${train_options[@]}")
}

# submit NAME LOGS DEPENDENCY ARGUMENTS: runs sbatch ARGUMENTS and sets `job` to the job id. DRY_RUN=1 prints
# the command instead.
submit() {
    local name=$1 logs=$2 dependency=$3 command
    shift 3
    command=(sbatch --parsable --chdir="$PWD" --output="$logs/%x-%j.out")
    # without the second option, a job whose predecessor failed would wait forever
    [ -z "$dependency" ] || command+=(--dependency="$dependency" --kill-on-invalid-dep=yes)
    command+=("$@")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        job=ID_OF_$name
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    mkdir -p "$logs"
    job=$("${command[@]}")
    job=${job%%;*}  # a federation appends ;CLUSTER
    echo "$name $job"
}
