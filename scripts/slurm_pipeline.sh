#!/usr/bin/env bash
# Submits prune -> train -> merge and eval as jobs that wait for each other, and prints their ids.
#   scripts/slurm_pipeline.sh CONFIG [KEY=VALUE...]
# DRY_RUN=1 prints the sbatch commands instead. NODES, GPUS_PER_NODE and the rest: scripts/cluster.env.example.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cluster.sh
"${sppctl[@]}" config "$@" > /dev/null  # a wrong configuration is told now, not by a job tomorrow

logs=runs/logs
job=

# submit STAGE OPTIONS: a job that starts when the one before it has succeeded; `job` becomes its id
submit() {
    local stage=$1 command
    shift
    command=(sbatch --parsable --chdir="$PWD" --output="$logs/%x-%j.out")
    # without the second option a job whose predecessor failed would wait for ever
    [ -z "$job" ] || command+=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    command+=("$@" "scripts/slurm_$stage.sh" "${arguments[@]}")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        job=ID_OF_${stage^^}
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    mkdir -p "$logs"
    job=$("${command[@]}")
    job=${job%%;*}  # a federation adds ;CLUSTER
    echo "$stage $job"
}

arguments=("$@")
gpus=${GPUS_PER_NODE:-8}
read -ra prune_options <<< "${PRUNE_OPTIONS:-}"
read -ra train_options <<< "${TRAIN_OPTIONS:-}"
read -ra eval_options <<< "${EVAL_OPTIONS:-}"
submit prune "${prune_options[@]}"
submit train --nodes="${NODES:-1}" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" "${train_options[@]}"
submit eval "${eval_options[@]}"
