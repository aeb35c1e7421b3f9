#!/usr/bin/env bash
# The tests, from nothing:  bash launch/test.sh [pytest arguments ...]
# makes a venv, installs, lints, runs the fast suite (slow ones: bash launch/test.sh -m slow).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv "[test]"
cd "$ROOT"
echo "== ruff"
"$PY" -m ruff check .
echo "== pytest"
JAX_PLATFORMS=cpu exec "$PY" -m pytest "$@"
