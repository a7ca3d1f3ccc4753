#!/usr/bin/env bash
# Installs into .venv and trains a tiny autoencoder through all three phases on
# photographs that come with installed packages; the report is in
# runs/quickstart/report/. Arguments are passed on: --config.KEY=VALUE.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh requirements-quickstart.txt
python -m dcae_jax.main --config=configs/quickstart.py \
  --workdir=runs/quickstart "$@"
