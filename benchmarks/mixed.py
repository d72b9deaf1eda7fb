"""One bundle of three kinds of users: a third with cores, a third with own numbers, a third with both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from soppu.adapter import LoraAdapter
from soppu.compress import Bundle, CompressOptions, compress
from soppu.compress.codec.page import PageWriter
from soppu.compress.numbers.components import Components, Side, concatenate

_PAGE = 64  # users


def mixed(adapters: Mapping[str, LoraAdapter], *, rank: int, max_error: float = 0.01) -> Bundle:
    """The users in turn by the joint method, by their own numbers, and by half of either: the same sum.

    `rank` is that of the shared basis; it should hold every adapter. Own numbers keep `max_error`.
    """
    exact = CompressOptions(method="joint", rank=rank, basis_bits=32, core_bits=32, device="cpu")
    shared = compress(adapters, exact)
    own = compress(adapters, CompressOptions(method="svd", max_error=max_error, device="cpu"))
    writer = PageWriter()
    for number, user in enumerate(shared.users):
        cores, numbers = shared.of(user), own.of(user)
        parts = []
        for name in shared.shapes:
            out, inn = shared.bases[name][0]
            parts.append(_kind(number % 3, cores[name], _beside(numbers[name], out.k, inn.k)))
        writer.add([part.renumbered(torch.zeros(number + 1, dtype=torch.int64)) for part in parts], users=1)
        if number % _PAGE == _PAGE - 1:
            writer.close()
    return replace(shared, pages=writer.close(), _last={})


def _kind(which: int, core: Components, own: Components) -> Components:
    if which == 2:
        return concatenate([replace(part, gain=part.gain / 2) for part in (core, own)])
    return own if which else core


def _beside(part: Components, k_out: int, k_in: int) -> Components:
    """Components without coordinates, as they are written beside others that have some."""
    return replace(part, left=_widened(part.left, k_out), right=_widened(part.right, k_in))


def _widened(side: Side, k: int) -> Side:
    return replace(side, coords=torch.zeros(0, k))
