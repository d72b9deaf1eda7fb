"""Adding the users' change to a layer's output: in plain torch, or by the compiled CPU kernel.

Both take the same arguments and give the same result up to rounding; `step` decides for which tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.errors import ConfigError
from soppu.serve.vllm_plugin.worker import build
from soppu.serve.vllm_plugin.worker.resident import Basis

_LOG = logging.getLogger(__name__)
CHUNK = 512  # tokens whose cores are gathered at a time: bounds what a long prompt needs
_NATIVE_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Which row of a table serves which token.

    Attributes:
        cores: (rows + 1, width) the table.
        rows: (t,) int64 its row for every token.
        places: (t,) int64 where those tokens stand in the batch; None where they are the first t.
    """

    cores: Tensor
    rows: Tensor
    places: Tensor | None


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
    torch.ops.soppu_native.apply(
        x,
        y,
        basis.V,
        basis.U,
        tokens.cores,
        basis.spans,
        tokens.rows,
        tokens.places,
        basis.k,
        basis.offset,
    )


def choose(kind: str, *, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for `kind`, "auto", "native" or "torch".

    Raises:
        ConfigError: "native" was asked for and cannot be had; the message says why.
    """
    if kind == "torch":
        return plain
    why = ""
    if device.type != "cpu" or dtype not in _NATIVE_TYPES:
        why = f"it exists for float32 and bfloat16 on the CPU, the model is {dtype} on {device.type}"
    else:
        why = build.load()
    if not why:
        return native
    if kind == "native":
        raise ConfigError(f"SOPPU_KERNEL='native': {why}; allowed here are auto, torch")
    if device.type == "cpu":
        _LOG.warning("the compiled kernel cannot be had, plain torch serves more slowly: %s", why)
    return plain
