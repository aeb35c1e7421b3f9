#!/usr/bin/env bash
# The main job on the embedded default, from nothing:
#   bash launch/demo.sh [WORKDIR] [--config.field=value ...]
# makes a venv, installs, distils the shipped text-to-emoji teacher into a 4-step student and
# evaluates it. Run it again with the same WORKDIR to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
WORKDIR="$ROOT/runs/demo"
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then WORKDIR="$(realpath -m "$1")"; shift; fi
make_venv ""
echo "== distilling into $WORKDIR (minutes on 2 cores)"
cd "$ROOT"
"$PY" -m ddmd_jax.main --config=configs/emoji.py --workdir="$WORKDIR" "$@"
