#!/usr/bin/env bash
# A run on the GPU nodes of a Slurm cluster:
#   bash launch/slurm_gpu.sh ACTION [--name=VALUE ...] [--dry-run] [-- --config.field=value ...]
#
#   setup    makes the venv with CUDA's JAX, on a machine that sees the nodes' file system
#   run      submits the job; it is put back into the queue if its nodes are taken away
#   resume   the same: the same --workdir goes on where its newest checkpoint is
#   status   says what of it is queued or runs
#   logs     follows its log
#   stop     sends it SIGTERM: it saves between two steps and ends
#
# One process a GPU: JAX reads Slurm's variables itself, and takes GPU number SLURM_LOCALID of those
# it sees. A task must therefore see all GPUs of its node: --gpus-per-node, never --gpus-per-task.
# Shortly before the time is up, Slurm sends SIGTERM, and the run saves.
# The checkout, the venv and --workdir must be on a file system that all nodes see.
# --dry-run prints the settings and every command, and runs none. Not tried on a real cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_settings.sh

setting NAME ddmd "the job"
setting NODES 2 "nodes"
setting GPUS 8 "GPUs of a node"
setting CPUS 8 "CPU cores for each GPU"
setting TIME 24:00:00 "at most"
setting GRACE 300 "seconds of it that are left for the last checkpoint"
setting PARTITION "" "empty: the cluster's own"
setting ACCOUNT "" "empty: yours"
setting CONFIG configs/lumina.py "config of the run"
setting WORKDIR runs/ddmd "folder of the run"
setting MEMORY "${XLA_CLIENT_MEM_FRACTION:-0.92}" "share of each GPU's memory, in XLA_CLIENT_MEM_FRACTION"
setting VENV .venv "folder of the venv"
parse "$@"

submit() {
  local where=()
  [ -z "$PARTITION" ] || where+=("--partition=$PARTITION")
  [ -z "$ACCOUNT" ] || where+=("--account=$ACCOUNT")
  run mkdir -p "$WORKDIR"
  run sbatch "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS" \
    "--cpus-per-task=$CPUS" "--time=$TIME" "--signal=TERM@$GRACE" --requeue --open-mode=append \
    "--output=$WORKDIR/slurm.log" "${where[@]}" \
    "--export=ALL,XLA_CLIENT_MEM_FRACTION=$MEMORY" \
    "--wrap=$(line srun --kill-on-bad-exit=1 "--cpus-per-task=$CPUS" "$VENV/bin/python" \
      -m ddmd_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" "${REST[@]}")"
}

need NAME NODES GPUS CPUS TIME CONFIG WORKDIR VENV
case "$ACTION" in
  setup) run env "DDMD_VENV=$VENV" bash -c 'source launch/_venv.sh && make_venv "[cuda]"' ;;
  run | resume) submit ;;
  status) run squeue --me "--name=$NAME" ;;
  logs) run tail -n 50 -F "$WORKDIR/slurm.log" ;;
  stop) run scancel --signal=TERM "--name=$NAME" --me ;;
  *) die "expected setup, run, resume, status, logs or stop, got '${ACTION:-nothing}'; --help says more" ;;
esac
