#!/usr/bin/env bash
# The tests, from nothing:  bash launch/test.sh [pytest arguments ...]
# makes a venv, installs, lints, checks types, runs the fast suite (slow ones: bash launch/test.sh -m slow)
# in as many processes as there are cores, four at most.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv "[test]"
cd "$ROOT"
echo "== ruff"
"$PY" -m ruff check .
echo "== mypy"
"$PY" -m mypy
echo "== pytest"
JAX_PLATFORMS=cpu exec "$PY" -m pytest -n logical --maxprocesses=4 --dist worksteal "$@"
