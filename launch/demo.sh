#!/usr/bin/env bash
# The main job on the embedded default, from nothing:
#   bash launch/demo.sh [WORKDIR] [--config.field=value ...]
# makes a venv, installs, distils the shipped teacher of emoji scenes into a 4-step student and
# evaluates it. Run it again with the same WORKDIR to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
WORKDIR="$ROOT/runs/demo"
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then WORKDIR="$(realpath -m "$1")"; shift; fi
make_venv ""
echo "== distilling into $WORKDIR (minutes on 2 cores)"
cd "$ROOT"
# On a CPU: a device for each of two or four cores, and memory in large pages, kept between steps.
CORES=$(getconf _NPROCESSORS_ONLN)
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=$((CORES >= 4 ? 4 : CORES >= 2 ? 2 : 1))}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.arena_max=1}"
"$PY" -m ddmd_jax.main --config=configs/emoji.py --workdir="$WORKDIR" "$@"
