#!/usr/bin/env bash
# On a node with network access: downloads everything that a run needs into the Hugging Face cache, then opens it
# offline, as a compute node would. Set HF_HOME to a directory that the compute nodes can read.
#   scripts/prefetch.sh CONFIG [KEY=VALUE...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cluster.sh
resolved=$(mktemp --suffix=.yaml)
trap 'rm -f "$resolved"' EXIT
"${sppctl[@]}" config "$@" > "$resolved"
[ "${HF_HUB_OFFLINE:-0}" = 1 ] || "${python[@]}" scripts/prefetch.py "$resolved"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "${python[@]}" scripts/prefetch.py "$resolved"
