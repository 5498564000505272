#!/bin/sh
# One pinned environment per peer: setup_peers.sh FOLDER [PEER ...]; it is made where run.py's --environments looks.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
shift
[ $# -gt 0 ] || set -- hqq optimum-quanto torchao bitsandbytes auto-round llmcompressor
for peer in "$@"; do
    [ -x "$folder/$peer/bin/python" ] || python3 -m venv "$folder/$peer"
    "$folder/$peer/bin/python" -m pip install --quiet --requirement "$here/requirements/$peer.txt"
    "$folder/$peer/bin/python" -m pip freeze > "$folder/$peer/frozen.txt"
done
