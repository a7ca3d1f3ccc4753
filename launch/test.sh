#!/usr/bin/env bash
# Installs into .venv and runs the linter and the tests. Arguments are passed to
# pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/install.sh requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
