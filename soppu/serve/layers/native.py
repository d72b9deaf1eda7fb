"""The compiled kernel of `kernel.cpp`, as an operator of torch."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from soppu.serve import compiled

TYPES = (torch.float32, torch.bfloat16)
_SOURCE = Path(__file__).with_name("kernel.cpp")


@functools.cache
def load() -> str:
    """Make `torch.ops.soppu_native.apply` available; "" if it is, else why not. 10 to 30 s the first time."""
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    headers = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        path = compiled.library(_SOURCE, flags=[abi, *headers, *libraries], made_with=torch.__version__)
        torch.ops.load_library(path)
    except (compiled.NotCompiled, OSError) as error:
        return str(error)
    return ""
