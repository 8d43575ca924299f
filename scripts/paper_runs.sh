#!/usr/bin/env bash
# Runs the paper's settings by name, MODEL-METHOD-PATTERN, on Slurm or locally, with the hyperparameters of
# configs/MODEL.yaml.
#   scripts/paper_runs.sh --list
#   scripts/paper_runs.sh [--dry-run] [--local] NAME [KEY=VALUE...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cluster.sh

models=(llama7b llama13b llama30b llama65b llama2-70b)
methods=(wanda sparsegpt)
patterns=(0.5 2of4 2of8)  # 2of8 keeps 2 weights in every 8: 75 % sparsity

fail() {
    echo "error: $1" >&2
    exit 2
}

# each name with its configuration and overrides
declare -A settings=()
names=()
for model in "${models[@]}"; do
    for method in "${methods[@]}"; do
        for pattern in "${patterns[@]}"; do
            name=$model-$method-$pattern
            names+=("$name")
            settings[$name]="$model prune.method=$method prune.pattern=${pattern/of/:} run.dir=runs/$name"
        done
    done
done

local=0
while [[ ${1:-} == -* ]]; do
    case $1 in
        --list)
            printf '%s\n' "${names[@]}"
            exit
            ;;
        --dry-run) export DRY_RUN=1 ;;
        --local) local=1 ;;
        *) fail "$1 is none of --list, --dry-run, --local" ;;
    esac
    shift
done
[ $# -gt 0 ] || fail "which run? scripts/paper_runs.sh --list prints their names"
[ -n "${settings[$1]:-}" ] || fail "$1 is no run of the paper; scripts/paper_runs.sh --list prints their names"
read -ra arguments <<< "${settings[$1]}"
shift
arguments+=("$@")
if [ $local = 0 ]; then
    exec scripts/slurm_pipeline.sh "${arguments[@]}"
elif [ "${DRY_RUN:-0}" = 1 ]; then
    "${sppctl[@]}" config "${arguments[@]}" > /dev/null
    printf '%q ' "${sppctl[@]}" run "${arguments[@]}"
    echo
else
    exec "${sppctl[@]}" run "${arguments[@]}"
fi
