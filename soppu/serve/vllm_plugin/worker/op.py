"""The custom operator that the engine's compiled graph holds: opaque to the compiler, it asks the Step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import Library

from soppu.serve.vllm_plugin.worker.residents import Residents

_SCHEMA = "apply(Tensor x, Tensor(a!) y, int layer) -> ()"


class _Current:
    """The step of this process's worker."""

    step: Residents | None = None


def serve(step: Residents) -> None:
    """Let the operator ask `step` from now on."""
    register()
    _Current.step = step


@functools.cache
def register() -> Library:
    """Define `torch.ops.soppu.apply`, once in a process; the library lives as long as its definition."""
    library = Library("soppu", "FRAGMENT")
    library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("apply", _apply, dispatch_key="CompositeExplicitAutograd")
    library.impl("apply", _fake, dispatch_key="Meta")
    return library


def _apply(x: Tensor, y: Tensor, layer: int) -> None:
    if _Current.step is not None:
        _Current.step.apply(x, y, layer)


def _fake(x: Tensor, y: Tensor, layer: int) -> None:
    """Shapes only: `y` keeps its own."""
