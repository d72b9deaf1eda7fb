"""C++ of ours, compiled for this machine's processor at its first use, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from soppu import files
from soppu.errors import SoppuError

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20", "-shared", "-fPIC")
_SECONDS = 300


class NotCompiled(SoppuError):
    """No compiler, or it failed; the message says which."""


def library(source: Path, *, flags: Sequence[str] = (), made_with: str = "") -> Path:
    """The shared library of one source. Seconds the first time.

    Args:
        made_with: what else it depends on, as the version of a library that `flags` link it to.

    Raises:
        NotCompiled: it cannot be had on this machine.
    """
    wanted = os.environ.get("CXX", "g++")
    compiler = shutil.which(wanted)
    if compiler is None:
        raise NotCompiled(f"no C++ compiler: {wanted!r} is not on the PATH (CXX names another)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "soppu"
    try:
        key = _key(source, compiler, f"{made_with} {' '.join((*_FLAGS, *flags))}")
        path = cache / f"{source.stem}-{key}.so"
        if not path.exists():
            with files.atomic_path(path) as temporary:
                command = [compiler, *_FLAGS, str(source), "-o", str(temporary), *flags]
                subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace")[-400:]
        raise NotCompiled(f"{compiler} failed: {told}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"{source.name}: {error}") from error
    return path


def _key(source: Path, compiler: str, made_with: str) -> str:
    """Changes with the source, the compiler, how it is called, and this processor's instructions."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    told = f"{made_with} {_processor()}".encode()
    return hashlib.sha256(source.read_bytes() + version + told).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
