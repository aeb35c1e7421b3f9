#!/usr/bin/env bash
# A run on GKE by xpk (https://github.com/AI-Hypercomputer/xpk), which makes the JobSet itself:
#   bash launch/xpk.sh ACTION [--name=VALUE ...] [--dry-run] [-- --config.field=value ...]
#
#   image    builds launch/docker/Dockerfile and pushes it as --image
#   create   makes a cluster with node pools of this TPU
#   run      starts the run as a workload, which is started again --restarts times if it ends badly
#   resume   deletes the workload and starts it anew: the same --workdir goes on
#   status   lists the cluster's workloads
#   stop     deletes the workload
#   delete   deletes the cluster
#
# --workdir has to be a folder that all pods see. xpk knows the storage of a cluster
# (`xpk storage attach`); launch/gke_jobset.yaml mounts a bucket without it.
# Needs xpk, gcloud and docker. --dry-run prints the settings and every command, and runs none.
# Not tried on a real cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/_settings.sh

setting NAME ddmd "the workload"
setting CLUSTER ddmd "the cluster"
setting PROJECT "" "Google Cloud project"
setting ZONE us-west4-a "where there are TPUs of this type"
setting TYPE v5litepod-16 "accelerator type of a slice"
setting SLICES 1 "slices; config.mesh.data must divide by them"
setting SPOT 1 "1: pre-emptible, cheaper; 0: on demand"
setting IMAGE "" "name of the image, with its registry"
setting RESTARTS 10 "how often a workload that ended badly is started again"
setting CONFIG configs/lumina.py "config of the run"
setting WORKDIR /runs/ddmd "folder of the run, in the pods"
parse "$@"

start() {
  need IMAGE
  run xpk workload create "--workload=$NAME" "${WHERE[@]}" "--tpu-type=$TYPE" "--num-slices=$SLICES" \
    "--docker-image=$IMAGE" "--max-restarts=$RESTARTS" \
    "--command=$(line python -m ddmd_jax.main "--config=$CONFIG" "--workdir=$WORKDIR" "${REST[@]}")"
}

stop() {
  run xpk workload delete "--workload=$NAME" "${WHERE[@]}"
}

need PROJECT CLUSTER ZONE
WHERE=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
KIND=(--on-demand)
[ "$SPOT" = 0 ] || KIND=(--spot)
case "$ACTION" in
  image)
    need IMAGE
    run docker build --file=launch/docker/Dockerfile --build-arg=EXTRAS=tpu,gcs "--tag=$IMAGE" .
    run docker push "$IMAGE" ;;
  create) run xpk cluster create "${WHERE[@]}" "--tpu-type=$TYPE" "--num-slices=$SLICES" "${KIND[@]}" ;;
  run) start ;;
  resume) need IMAGE; stop; start ;;
  status) run xpk workload list "${WHERE[@]}" ;;
  stop) stop ;;
  delete) run xpk cluster delete "${WHERE[@]}" ;;
  *) die "expected image, create, run, resume, status, stop or delete, got '${ACTION:-nothing}'; --help says more" ;;
esac
