#!/usr/bin/env bash
# Writes requirements*.txt: the version and the hashes of every package, for all
# Python versions, from the ranges of pyproject.toml. It keeps the versions that
# are there where the ranges allow them; --upgrade takes the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {  # FILE, then what to put into it
  local file="requirements$1.txt"; shift
  uv pip compile pyproject.toml --quiet --universal --generate-hashes \
    --no-annotate --custom-compile-command "bash launch/lock.sh" \
    --group build -o "$file" "$@"
}
lock -dev --extra dev "$@"
for extra in "" quickstart cuda12 tpu; do  # the same versions as above
  lock "${extra:+-$extra}" --extra all ${extra:+--extra "$extra"} \
    -c requirements-dev.txt
done
