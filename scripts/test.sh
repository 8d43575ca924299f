#!/usr/bin/env bash
# Lint of Python and shell, types and the whole test suite, as CI runs them. With --quick first, without the tests that
# are marked slow. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=()
if [ "${1:-}" = --quick ]; then
    shift
    selection=(-m "not slow")
fi
source scripts/environment.sh
ensure_environment "[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/shellcheck scripts/*.sh scripts/cluster.env.example
# the slowest files first (tests/conftest.py); a worker for each core and one thread for each worker: tiny models gain
# nothing from more
OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses "${WORKERS:-$(nproc)}" --dist loadfile --no-loadscope-reorder \
    "${selection[@]}" "$@"
