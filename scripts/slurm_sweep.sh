#!/usr/bin/env bash
# One part of a sweep that several runs share (evaluation of the dense model, a pruned checkpoint), or the report over
# all runs. From the root of the checkout: sbatch scripts/slurm_sweep.sh SWEEP.yaml [KEY=VALUE...] --only NAME
# `sppctl sweep SWEEP.yaml --slurm DIR` writes the jobs that call this script, and those of the runs.
#SBATCH --job-name=sppctl-sweep
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
in_job "${sppctl[@]}" sweep "$@" launch.num_machines=1 launch.num_processes=auto
