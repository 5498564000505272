#!/bin/sh
# The rivals' pinned environment, with what strop itself needs: setup.sh FOLDER; then FOLDER/bin/python -m benchmarks.decoding.run
set -eu
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$1/bin/python" ] || python3 -m venv "$1"
"$1/bin/python" -m pip install --quiet --requirement "$here/requirements.txt" "$here/../.."
"$1/bin/python" -m pip uninstall --quiet --yes strop # its sources are read where they lie
"$1/bin/python" -m pip freeze > "$1/frozen.txt"
