#!/usr/bin/env bash
# Lints Python and shell, checks types and runs the whole test suite, as CI does. --quick, as the first argument, leaves
# out the tests marked slow. Other arguments are passed to pytest.
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
# the slowest files first (tests/conftest.py); one worker per core and one thread per worker, because tiny models gain
# nothing from more
OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses "${WORKERS:-$(nproc)}" --dist loadfile --no-loadscope-reorder \
    "${selection[@]}" "$@"
