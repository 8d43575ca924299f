#!/usr/bin/env bash
# pruned + adapter -> merged, then the evaluation of base, pruned and merged, and the report: what is left for
# `sppctl run` after pruning and training. From the root of the checkout:
#   sbatch scripts/slurm_eval.sh CONFIG [KEY=VALUE...]
#SBATCH --job-name=sppctl-eval
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
in_job "${sppctl[@]}" run "$@" launch.num_machines=1 launch.num_processes=1
