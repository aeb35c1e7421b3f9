#!/usr/bin/env bash
# The tests, from nothing:  bash launch/test.sh [pytest arguments ...]
# makes a venv, installs, lints, checks types, runs the fast suite in as many processes as there are cores, four at
# most. With arguments it runs those tests alone (slow ones: bash launch/test.sh -m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv "[test]"
cd "$ROOT"
if (($# == 0)); then
  echo "== ruff"
  "$PY" -m ruff check .
  echo "== mypy"
  "$PY" -m mypy
fi
echo "== pytest"
JAX_PLATFORMS=cpu exec "$PY" -m pytest -n logical --maxprocesses=4 --dist worksteal "$@"
