#!/usr/bin/env bash
# From nothing but Python to a pruned, retrained, merged and evaluated model. Arguments go to `sppctl run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
ensure_environment ""
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/sppctl run "$@"
