#!/usr/bin/env bash
# What is worth a few minutes of an accelerator, one part after another, each bounded in time:
#
#     bash benchmarks/accelerator.sh OUT [PART ...]
#
# A part is a module of benchmarks/accelerator; it leaves OUT/PART.json (device, versions, command,
# figures) and what its docstring names. At its time's end it is sent SIGTERM, saves and stops. A
# variable PART_FLAGS (TEACHER_FLAGS='--seconds=400 --config.seed=1') adds flags to its own, PYTHON
# names another interpreter, GPU_MIB the memory of a GPU, which decides what is trained of a
# critic. Exits with 1 if a part failed; the others run all the same.
#
# All parts take more than a loan of 15 minutes. Two calls of ten minutes at most; a rerun on the same
# machine finds programs compiled, and its compile_seconds are those of reading them:
#
#     bash benchmarks/accelerator.sh OUT selftest first_light largest     # 450 s
#     bash benchmarks/accelerator.sh OUT vs_torch                         # 400 s; on an H200, full size
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if (($# == 0)); then
    sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift

# In their order of worth; the embedded teacher is good as it is, and comes last:
PARTS=(selftest first_light largest study vs_torch sdxl zimage_lora vs_torch_compiled teacher codec)
# Others are their own:
declare -A MODULE_OF=([largest]=first_light [sdxl]=first_light [zimage_lora]=first_light
    [vs_torch_compiled]=vs_torch)
declare -A SECONDS_OF=(  # unless --seconds says otherwise; the U-Net's layers are compiled one by one
    [selftest]=90 [first_light]=180 [largest]=180 [study]=240 [teacher]=240 [codec]=180
    [vs_torch]=400 [sdxl]=400 [zimage_lora]=180 [vs_torch_compiled]=500)
# Everything of Lumina or SDXL is trained where there is memory for it. In 80 GB the critic is
# adapters, moments are bf16, and the EMA is the host's.
mib=${GPU_MIB:-$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    head -n 1)}
ROWS='--config.data.global_batch=4 --config.teacher.param_dtype=bfloat16
    --config.train.teacher_passes=apart'
AGAIN='--tolerance=0.01'  # by which a second run may differ: cuDNN's backward pass adds in any order
FIT="$ROWS" SIZE=full
if ((${mib:-0} < 120000)); then
    FIT="$ROWS --config.critic.adapter.kind=lora --config.critic.adapter.rank=64
        --config.train.offload=ema --config.optim.student.mu_dtype=bfloat16
        --config.optim.critic.mu_dtype=bfloat16"
    SIZE=half
fi
# JAX takes three quarters of a device's memory, unless it is told of more.
export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-.95}
# What a part has compiled, a part that is run again finds.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${TMPDIR:-/tmp}/ddmd_jax_programs}
declare -A FLAGS_OF=(
    [first_light]="--config=lumina $AGAIN $FIT"
    [largest]="--name=largest --largest --config=lumina $FIT"
    [vs_torch]="--size=$SIZE --notiny_first"
    [vs_torch_compiled]="--name=vs_torch_compiled --size=$SIZE --notiny_first --compile"
    [sdxl]="--name=sdxl --config=sdxl:decoupled_hybrid --config.train.accumulate=1 $AGAIN $FIT"
    [zimage_lora]="--name=zimage_lora --config=zimage:lora --config.student.steps=4 $AGAIN $ROWS"
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
    if [[ -z ${SECONDS_OF[$part]:-} ]]; then
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
        "${PYTHON:-python3}" -m "benchmarks.accelerator.${MODULE_OF[$part]:-$part}" \
        --out="$out" "${flags[@]}" || {
        echo "accelerator: part $part ended with code $?" >&2
        failed=1
    }
done
exit $failed
