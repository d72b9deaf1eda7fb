"""The compiled kernel of `kernel.cpp`: built once on a machine, into a cache of its own."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from soppu import files

TYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("kernel.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC")
_COMPILE_SECONDS = 300


@functools.cache
def load() -> str:
    """Make `torch.ops.soppu_native.apply` available; "" if it is, else why not. 10 to 30 s the first time."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return f"no C++ compiler: {os.environ.get('CXX', 'g++')!r} is not on the PATH (CXX names another)"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache / "soppu" / f"soppu_native-{_key(compiler)}.so"
    try:
        if not path.exists():
            with files.atomic_path(path) as temporary:
                _compile(compiler, temporary)
        torch.ops.load_library(path)
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {error.stderr.decode(errors='replace')[-400:]}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}: {error}"
    return ""


def _compile(compiler: str, out: Path) -> None:
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    headers = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [compiler, *_FLAGS, abi, *headers, str(_SOURCE), "-o", str(out), *libraries]
    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)


def _key(compiler: str) -> str:
    """Changes with the source, torch, the compiler, and the instructions of this machine's processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    made_with = f"{torch.__version__} {' '.join(_FLAGS)} {_processor()}"
    return hashlib.sha256(_SOURCE.read_bytes() + version + made_with.encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
