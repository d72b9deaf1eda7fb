"""Adding the users' change to a layer's output: in plain torch, or by the compiled CPU kernel.

Both take the same arguments and give the same result up to rounding; `step` decides for which tokens.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soppu import files
from soppu.errors import ConfigError
from soppu.serve.vllm_plugin.worker.resident import Basis

_LOG = logging.getLogger(__name__)
CHUNK = 512  # tokens whose cores are gathered at a time: bounds what a long prompt needs
_NATIVE_TYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("kernel.cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC")
_COMPILE_SECONDS = 300


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which row of a table serves which token."""

    cores: Tensor  # (rows + 1, width) the table
    rows: Tensor  # (t,) int64 its row for every token
    places: Tensor | None  # (t,) int64 where those tokens stand in the batch; None: they are the first t


Kernel = Callable[[Tensor, Tensor, Basis, Tokens], None]


def plain(x: Tensor, y: Tensor, basis: Basis, tokens: Tokens) -> None:
    """`x` (T, i): add U S V^T x to the tokens' rows of `y` (T, o), in place. O(t (m k (i + k) + k o))."""
    for begin in range(0, len(tokens.rows), CHUNK):
        rows = tokens.rows[begin : begin + CHUNK]
        if tokens.places is None:
            _plain(x[begin : begin + len(rows)], y[begin : begin + len(rows)], basis, tokens.cores[rows])
        else:
            places = tokens.places[begin : begin + CHUNK]
            some = y[places]
            _plain(x[places], some, basis, tokens.cores[rows])
            y[places] = some


def _plain(x: Tensor, y: Tensor, basis: Basis, cores: Tensor) -> None:
    m, k = len(basis.spans), basis.k
    cores = cores[:, basis.offset : basis.offset + m * k * k].reshape(-1, k, k)
    s = torch.bmm((x @ basis.V).view(-1, 1, k), cores).view(-1, m, k)
    for number, (at, U) in enumerate(basis.outputs()):
        y[:, at : at + U.shape[1]].addmm_(s[:, number], U)


def native(x: Tensor, y: Tensor, basis: Basis, tokens: Tokens) -> None:
    """`plain` in one pass, compiled: a fraction of the time at the batch sizes of decoding. CPU only."""
    table = (tokens.cores, basis.spans, tokens.rows, tokens.places)
    torch.ops.soppu_native.apply(x, y, basis.V, basis.U, *table, basis.k, basis.offset)


def choose(kind: str, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for `kind`, "auto", "native" or "torch".

    Raises:
        ConfigError: "native" was asked for and cannot be had; the message says why.
    """
    if kind == "torch":
        return plain
    if device.type != "cpu" or dtype not in _NATIVE_TYPES:
        why = f"it exists for float32 and bfloat16 on the CPU, the model is {dtype} on {device.type}"
    elif not (why := load()):
        return native
    if kind == "native":
        raise ConfigError(f"SOPPU_KERNEL='native': {why}; allowed here are auto, torch")
    if device.type == "cpu":
        _LOG.warning("the compiled kernel cannot be had, plain torch serves more slowly: %s", why)
    return plain


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
