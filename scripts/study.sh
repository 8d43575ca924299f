#!/usr/bin/env bash
# The study behind docs/results.md: computes the cells that have no record yet, then writes the page. Stop and continue
# it at any time. Needs C4, Alpaca, WikiText-2 and the tasks, from the hub or its cache.
#   scripts/study.sh [--subset quick] [--page] [--dry-run] [--only NAME] [--work DIRECTORY]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
ensure_environment ""
exec .venv/bin/python benchmarks/study "$@"
