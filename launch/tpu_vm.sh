#!/usr/bin/env bash
# A run on Cloud TPU VMs, one host or a pod, by gcloud:
#   bash launch/tpu_vm.sh ACTION [--name=VALUE ...] [--dry-run] [-- --config.field=value ...]
#
#   create   asks for the TPU, as a queued resource, and waits until it is there
#   setup    copies the committed state of this checkout to every host and installs it there;
#            mounts --bucket as /mnt/ddmd: a pod needs a folder that all its hosts see
#   run      starts the run on every host; goes on in the background, in ~/ddmd.log
#   resume   after a pre-emption: delete, create, setup, run. Where the TPU still stands, `run` is
#            enough: the same --workdir goes on from its newest checkpoint
#   logs     follows the log of the first host
#   delete   gives the TPU back; what is in the bucket stays
#
# The processes find one another by the TPU's metadata. Needs gcloud with a login and a project.
# --dry-run prints the settings and every command, and runs none. Not tried on a real TPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_settings.sh

setting NAME ddmd "the TPU and its queued resource"
setting PROJECT "" "Google Cloud project; empty: gcloud's own"
setting ZONE us-west4-a "where there are TPUs of this type"
setting TYPE v5litepod-16 "accelerator type"
setting RUNTIME v2-alpha-tpuv5-lite "runtime version that goes with the type"
setting SPOT 1 "1: pre-emptible, cheaper; 0: on demand"
setting QUEUED 1 "1: as a queued resource; 0: at once or not at all"
setting VALID_FOR 12h "how long to stay in the queue"
setting POLL 30 "seconds between looks at the queue"
setting BUCKET "" "bucket to mount as /mnt/ddmd; empty: none"
setting CONFIG configs/lumina.py "config of the run"
setting WORKDIR "" "folder of the run, on the hosts; empty: /mnt/ddmd/runs/NAME"
setting LIBTPU_FLAGS "--xla_enable_async_all_gather=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true" "of the TPU compiler, in LIBTPU_INIT_ARGS"
setting PYTHON_VERSION 3.12 "the images' own Python is too old: uv brings this one"
parse "$@"

WHERE=("--zone=$ZONE")
[ -z "$PROJECT" ] || WHERE+=("--project=$PROJECT")
TPU=(gcloud compute tpus)
ARCHIVE=ddmd_jax.tar.gz

everywhere() {
  run "${TPU[@]}" tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
}

wait_until_active() {
  local state ask=("${TPU[@]}" queued-resources describe "$NAME" "${WHERE[@]}" "--format=value(state.state)")
  echo "+ until $(line "${ask[@]}") says ACTIVE, every $POLL s"
  [ "$DRY_RUN" = 0 ] || return 0
  while true; do
    state="$("${ask[@]}")"
    echo "$(date +%T) $NAME: $state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "tpu_vm.sh: $NAME is $state; look with: $(line "${ask[@]::${#ask[@]}-1}")" >&2
        return 1 ;;
    esac
    sleep "$POLL"
  done
}

create() {
  local kind=()
  [ "$SPOT" = 0 ] || kind=(--spot)
  if [ "$QUEUED" = 0 ]; then
    run "${TPU[@]}" tpu-vm create "$NAME" "${WHERE[@]}" "--accelerator-type=$TYPE" "--version=$RUNTIME" "${kind[@]}"
    return
  fi
  run "${TPU[@]}" queued-resources create "$NAME" "--node-id=$NAME" "${WHERE[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" "--valid-until-duration=$VALID_FOR" "${kind[@]}"
  wait_until_active
}

setup() {
  run git archive --format=tar.gz --output="$ARCHIVE" HEAD
  run "${TPU[@]}" tpu-vm scp "$ARCHIVE" "$NAME:$ARCHIVE" "${WHERE[@]}" --worker=all
  run rm "$ARCHIVE"
  everywhere "mkdir -p ddmd_jax && tar -xzf $ARCHIVE -C ddmd_jax && python3 -m pip install --quiet --user uv && cd ddmd_jax && ~/.local/bin/uv venv --quiet --allow-existing --python $PYTHON_VERSION .venv && ~/.local/bin/uv pip install --quiet -e '.[tpu,gcs]'"
  [ -n "$BUCKET" ] || return 0
  everywhere "command -v gcsfuse || (echo 'deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-'\$(lsb_release -cs)' main' | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc > /dev/null && sudo apt-get update -q && sudo apt-get install -qy gcsfuse)"
  everywhere "sudo mkdir -p /mnt/ddmd && (mountpoint -q /mnt/ddmd || (sudo chown \$USER /mnt/ddmd && gcsfuse --implicit-dirs $BUCKET /mnt/ddmd))"
}

start() {
  everywhere "cd ddmd_jax && LIBTPU_INIT_ARGS=$(quoted "$LIBTPU_FLAGS") nohup .venv/bin/python -m ddmd_jax.main $(line "--config=$CONFIG" "--workdir=$WORKDIR" "${REST[@]}") > ~/ddmd.log 2>&1 < /dev/null & sleep 5; tail -n 3 ~/ddmd.log"
}

remove() {
  if [ "$QUEUED" = 0 ]; then
    run "${TPU[@]}" tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
  else
    run "${TPU[@]}" queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
  fi
}

# A folder of each host's own would be a checkpoint in pieces.
workdir() {
  [ -n "$WORKDIR$BUCKET" ] || die "no --bucket given, nor a --workdir that all hosts see"
  WORKDIR="${WORKDIR:-/mnt/ddmd/runs/$NAME}"
}

need NAME ZONE TYPE RUNTIME CONFIG
case "$ACTION" in
  create) create ;;
  setup) setup ;;
  run) workdir; start ;;
  resume) workdir; remove || echo "tpu_vm.sh: nothing was there to delete"; create; setup; start ;;
  logs) run "${TPU[@]}" tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=0 --command="tail -n 50 -F ~/ddmd.log" ;;
  delete) remove ;;
  *) die "expected create, setup, run, resume, logs or delete, got '${ACTION:-nothing}'; --help says more" ;;
esac
