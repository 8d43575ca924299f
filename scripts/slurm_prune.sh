#!/usr/bin/env bash
# base -> pruned in one job. From the root of the checkout: sbatch scripts/slurm_prune.sh CONFIG [KEY=VALUE...]
# Several tasks (--ntasks-per-node=4 --gpus-per-node=4) split the calibration windows and the layers.
# Finished blocks are kept: a job that was preempted or is close to its time limit is requeued and continues.
#SBATCH --job-name=sppctl-prune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
source scripts/cluster.sh
# the tasks share the work; a single one starts a process for each of its GPUs
in_job "${sppctl[@]}" prune "$@" launch.num_machines=1 launch.num_processes=auto
