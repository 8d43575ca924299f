#!/usr/bin/env bash
# Submits prune -> train -> merge and eval as jobs that wait for each other, and prints their ids.
#   scripts/slurm_pipeline.sh CONFIG [KEY=VALUE...]
# DRY_RUN=1 prints the sbatch commands instead. For NODES, GPUS_PER_NODE and more see scripts/cluster.env.example.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cluster.sh

logs=runs/logs
job_options
check_config "$@"
submit prune "$logs" "" "${prune_options[@]}" scripts/slurm_prune.sh "$@"
submit train "$logs" "afterok:$job" "${train_options[@]}" scripts/slurm_train.sh "$@"
submit eval "$logs" "afterok:$job" "${eval_options[@]}" scripts/slurm_eval.sh "$@"
