#!/usr/bin/env bash
# Installs sppctl, then prunes, retrains, merges and evaluates a model. Arguments are passed to `sppctl run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
ensure_environment ""
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/sppctl run "$@"
