#!/bin/sh
# Makes .venv-lorax, the environment of the real LoRAX client (its pins do not go with ours). Does nothing if it is there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv="$root/.venv-lorax"
version=0.6.3
if "$venv/bin/python" -c "import importlib.metadata as m, lorax, sys; sys.exit(m.version('lorax-client') != '$version')" 2>/dev/null; then
    exit 0
fi
rm -rf "$venv"
uv="$root/.venv/bin/uv"
"$uv" venv --quiet --python "${PYTHON:-python3}" "$venv"
"$uv" pip install --quiet --python "$venv/bin/python" "lorax-client==$version" requests
