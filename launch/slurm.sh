#!/usr/bin/env bash
#SBATCH --job-name=dcae_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One process for each GPU, which jax finds through SLURM:
#   sbatch launch/slurm.sh --config=configs/f64_phase1.py --workdir=/shared/phase1
# Options of sbatch before the script's name change the numbers above; keep one
# task for each GPU. Five minutes before its time is over, and when the job is
# preempted, the processes get SIGTERM, save and leave; the job queues itself
# again until result.json is there. --dry-run as the first argument prints every
# command and runs none; it needs no SLURM.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
DRY=""; [ "${1:-}" = "--dry-run" ] && { DRY=1; shift; }
WORKDIR=""; for x in "$@"; do [[ $x != --workdir=* ]] || WORKDIR="${x#*=}"; done
[ -n "$WORKDIR" ] || { echo "error: --workdir=... is missing" >&2; exit 2; }
VENV="${VENV:-.venv}"  # on a file system that all nodes share

step() { printf '+'; printf ' %q' "$@"; echo; [ -n "$DRY" ] || "$@"; }
if [ ! -x "$VENV/bin/python" ]; then
  step python3 -m venv "$VENV"
  step "$VENV/bin/pip" install -q --require-hashes -r requirements-cuda12.txt
fi
step srun --kill-on-bad-exit=1 "$VENV/bin/python" -m dcae_jax.main "$@"
if [ -n "$DRY" ] || [ ! -e "$WORKDIR/result.json" ]; then
  step scontrol requeue "${SLURM_JOB_ID:-JOB}"  # it was told to stop
fi
