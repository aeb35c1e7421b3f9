#!/usr/bin/env bash
# What is worth a few minutes of an accelerator, one part after another, each bounded in time:
#
#     bash benchmarks/accelerator.sh OUT [PART ...]
#
# A part is a module of benchmarks/accelerator; it leaves OUT/PART.json (device, versions, command,
# figures) and what its docstring names. At its time's end it is sent SIGTERM, saves and stops. A
# variable PART_FLAGS (TEACHER_FLAGS='--seconds=400 --config.seed=1') adds flags to its own, and
# PYTHON names another interpreter. Exits with 1 if a part failed; the others run all the same.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if (($# == 0)); then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift

PARTS=(teacher codec)  # in their order of worth
declare -A SECONDS_OF=([teacher]=240 [codec]=180)  # unless --seconds says otherwise
declare -A FLAGS_OF=(
    # Unrolled layers are for CPUs; here a scan is as fast, and compiled sooner.
    [teacher]='--config=emoji_teacher
        --config.teacher.model.denoiser.unroll=False
        --config.data.global_batch=1024 --config.data.scenes=262144
        --config.optim.student.lr=2e-3 --config.optim.student.muon_lr=0.02'
    [codec]='--config=emoji_codec --config.data.global_batch=256 --config.codec.frozen_encoder=True
        --config.init_from=ddmd_jax/families/emoji/files/codec.safetensors')
GRACE=30  # seconds that a part may take to save and to stop

failed=0
(($#)) || set -- "${PARTS[@]}"
for part in "$@"; do
    if [[ ! -f benchmarks/accelerator/$part.py || -z ${SECONDS_OF[$part]:-} ]]; then
        echo "accelerator: no part '$part'; there are: ${PARTS[*]}" >&2
        failed=1
        continue
    fi
    more="${part^^}_FLAGS"
    # shellcheck disable=SC2206  # several flags each
    flags=(--seconds="${SECONDS_OF[$part]}" ${FLAGS_OF[$part]:-} ${!more:-})
    limit=${SECONDS_OF[$part]}
    for flag in "${flags[@]}"; do
        [[ $flag == --seconds=* ]] && limit=${flag#--seconds=}
    done
    echo "== $part, $limit s"
    PYTHONUNBUFFERED=1 timeout --signal=TERM --kill-after=$GRACE "$limit" \
        "${PYTHON:-python3}" -m "benchmarks.accelerator.$part" --out="$out" "${flags[@]}" || {
        echo "accelerator: part $part ended with code $?" >&2
        failed=1
    }
done
exit $failed
