#!/usr/bin/env bash
# pruned -> adapter on all GPUs of a job, one task each. From the root of the checkout:
#   sbatch --nodes=2 scripts/slurm_train.sh CONFIG [KEY=VALUE...]
# Two minutes before the time limit, or when preempted, sppctl writes a checkpoint after the current step and exits with
# code 143; the job is requeued and the same command continues. Steps longer than a minute need an earlier signal:
# --signal=USR1@600.
#SBATCH --job-name=sppctl-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source scripts/cluster.sh
in_job "${sppctl[@]}" train "$@"
