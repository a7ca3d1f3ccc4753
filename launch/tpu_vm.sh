#!/usr/bin/env bash
# A training run on a Cloud TPU slice, from its creation to its end:
#   launch/tpu_vm.sh run NAME -- --config=configs/f64_phase1.py \
#     --workdir=gs://BUCKET/f64/phase1 [--config.KEY=VALUE ...]
# makes a queued resource of spot chips, installs the committed code on all hosts
# and runs the command on them; after a preemption it does so again, and the run
# goes on from its work directory. The slice is deleted when result.json is there.
# Also: `delete NAME`, and `profile NAME`, which traces the next steps.
# --dry-run as the first argument prints every command and runs none. ZONE,
# ACCELERATOR, RUNTIME, PROJECT and SPOT= (empty: on demand) are variables.
set -euo pipefail
cd "$(dirname "$0")/.."
DRY=""; [ "${1:-}" = "--dry-run" ] && { DRY=1; shift; }
ACTION="${1:-}"; NAME="${2:-}"; shift $(($# < 2 ? $# : 2))
[ "${1:-}" = "--" ] && shift
ACCELERATOR="${ACCELERATOR:-v5litepod-16}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"; SPOT="${SPOT---spot}"
WHERE=("--zone=${ZONE:-us-west4-a}" ${PROJECT:+"--project=$PROJECT"} --quiet)
WORKDIR=""; for x in "$@"; do [[ $x != --workdir=* ]] || WORKDIR="${x#*=}"; done

step() { printf '+'; printf ' %q' "$@"; echo; [ -n "$DRY" ] || "$@"; }
tpu() { step gcloud compute tpus "$@" "${WHERE[@]}"; }
on_all() { tpu tpu-vm ssh "$NAME" --worker=all --command="$1"; }
state() {  # of the queued resource: ACTIVE, SUSPENDED, FAILED, or nothing
  gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}
is_active() { [ -z "$DRY" ] && [ "$(state)" = ACTIVE ]; }
is_done() { step gcloud storage ls "$WORKDIR/result.json"; }
delete() { tpu queued-resources delete "$NAME" --force; }
create() {
  is_active && return
  tpu queued-resources create "$NAME" --node-id="$NAME" ${SPOT:+"$SPOT"} \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" || exit 1
  until [ -n "$DRY" ] || is_active; do
    case "$(state)" in FAILED | SUSPEND*) return 1 ;; esac
    sleep 30
  done
}
install() {  # the hosts' own Python can be too old: uv brings one
  local archive; archive="$(mktemp -d)/dcae_jax.tar.gz"
  step git archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$NAME:" --worker=all
  on_all 'mkdir -p dcae_jax && tar -xzf dcae_jax.tar.gz -C dcae_jax && cd dcae_jax && python3 -m pip install -q --user uv==0.13.9 && python3 -m uv venv -q --clear --python 3.12 .venv && python3 -m uv pip sync -q --require-hashes requirements-tpu.txt'
}
train() { on_all "cd dcae_jax && .venv/bin/python -m dcae_jax.main$(printf ' %q' "$@")"; }

case "$ACTION${NAME:+ }" in
  "run ")
    [[ $WORKDIR == gs://* ]] || { echo "error: --workdir=gs://... is missing" >&2; exit 2; }
    until { create && install && train "$@"; STATUS=$?; is_done; }; do
      sleep 60  # until a preemption shows in the state
      [ $STATUS = 0 ] || ! is_active || { echo "error: see above; $NAME is kept" >&2; exit 1; }
      delete || true
    done
    delete ;;
  "delete ") delete ;;
  "profile ") on_all 'pkill -USR1 -o -f "^[^ ]*python -m dcae_jax.main"' ;;
  *) sed -n '2,11s/^# //p' "$0" >&2; exit 2 ;;
esac
