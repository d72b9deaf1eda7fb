"""Lets vLLM's model runner V2 run on a CPU: its kernels by Triton's interpreter, told to be a driver.

Python imports a `sitecustomize` that is on its path in every process: give this folder as PYTHONPATH.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from triton.backends import Backend, backends


class _Driver:
    """What vLLM asks of a driver, and no more: compiling still fails, so start with --enforce-eager."""

    @staticmethod
    def is_active() -> bool:
        return True


backends["cpu"] = Backend(compiler=backends["nvidia"].compiler, driver=_Driver)  # type: ignore[type-abstract]
