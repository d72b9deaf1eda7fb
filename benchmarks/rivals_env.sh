#!/bin/sh
# Makes .venv-rivals, the environment of the two packages that compression is compared with. Does nothing if it is there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv="$root/.venv-rivals"
check="import importlib.metadata as m, sys, torch, lorashare, vlora
sys.exit((m.version('lorashare'), m.version('vlora-dev')) != ('0.1.3', '1.0.0'))"
if "$venv/bin/python" -c "$check" 2>/dev/null; then
    exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet torch==2.13.0   # first and exactly: the ranges of the two then install no other
"$venv/bin/pip" install --quiet torch==2.13.0 lorashare==0.1.3 vlora-dev==1.0.0
