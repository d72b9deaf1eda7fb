"""The method "ternary" (ComPEFT) as bundles hold it: every side of every component is a row of -1, 0 and 1.

`numbers.ternary` says which; here they become components, of one user after the other, and the density is
found that a target allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.codec.basis import Basis
from soppu.compress.codec.golomb import bits_per_value
from soppu.compress.codec.page import PageWriter
from soppu.compress.fleet.passes import Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.canonical import canonical
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.whitening import Whitener
from soppu.compress.methods.fit import Fit
from soppu.compress.numbers import ternary
from soppu.compress.numbers.coders import with_gains
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.errors import squared_errors
from soppu.compress.numbers.quantise import TERNARY
from soppu.compress.numbers.ternary import Ternary
from soppu.compress.options import CompressOptions
from soppu.errors import BundleError

_TRIES = 6
_CLOSE = 0.995
_LEAST, _MOST = 1e-4, 0.75  # densities; above, the second is no smaller than two bits a number


def fit(
    fleet: Fleet,
    options: CompressOptions,
    *,
    whiteners: Mapping[str, Whitener],
    size_of: Callable[[Fit], int],
    progress: Progress,
) -> Fit:
    """Compress a fleet by ternary signs: one pass over the adapters, or one for each density tried.

    Raises:
        BundleError: no density meets the target.
    """
    allowed = options.target.most_bytes(fleet.parameters)
    if not allowed:
        return _at_density(fleet, options, options.density, whiteners=whiteners, progress=progress)
    aim, good, density = float(allowed), None, 0.0
    for _ in range(_TRIES):
        density = _density(8 * aim / fleet.parameters)
        found = _at_density(fleet, options, density, whiteners=whiteners, progress=progress)
        size = size_of(found)
        if size <= allowed:
            good = found
            if size >= _CLOSE * allowed or density >= _MOST - 1e-6:
                break
        aim = max(aim + (allowed * (1 + _CLOSE) / 2 - size), 1.0)
    if good is None:
        raise BundleError(
            f"a ternary bundle of {allowed} bytes was asked for; at density {density:.2g} it has {size}"
        )
    return good


def _density(bits: float) -> float:
    """The largest density whose published code takes so many bits a number."""
    low, high = _LEAST, _MOST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_per_value(middle) <= bits else (low, middle)
    return low


def _at_density(
    fleet: Fleet,
    options: CompressOptions,
    density: float,
    *,
    whiteners: Mapping[str, Whitener],
    progress: Progress,
) -> Fit:
    writer, squared = PageWriter(), torch.zeros_like(fleet.norms)
    for place, (user, adapter) in enumerate(fleet.adapters.items()):
        signs = _signs(adapter, options, density)
        norm = fleet.norm[place : place + 1]
        parts = []
        for row, name in enumerate(fleet.shapes):
            if name not in signs:
                parts.append(_nothing(*fleet.shapes[name]))
                continue
            part = _components(signs[name], norm)
            if not options.faithful:
                part = _refined(adapter, name, part, norm, whiteners.get(name), options.alpha)
            pair = adapter.pairs[name]
            squared[row, place] = squared_errors(pair.B[None], pair.A[None], part, (None, None), norm=norm)[0]
            parts.append(part)
        writer.add(parts, users=1)
        progress(f"coding {user}", place + 1, len(fleet.users))
    pages = writer.close()
    nothing = {
        name: ((Basis.make(torch.zeros(o, 0), 0), Basis.make(torch.zeros(i, 0), 0)),)
        for name, (o, i) in fleet.shapes.items()
    }
    return Fit(
        bases=nothing,
        cluster=torch.zeros(len(fleet.users), dtype=torch.int64),
        pages=pages,
        squared=squared,
        certificates={
            name: Certificate.without_basis(int((norms > 0).sum()))
            for name, norms in zip(fleet.shapes, fleet.norms, strict=True)
        },
        steps=dict.fromkeys(fleet.shapes, 0),
        numbers=writer.numbers,
        storage=f"signs, density {density:.3g}",
    )


def _signs(adapter: LoraAdapter, options: CompressOptions, density: float) -> dict[str, Ternary]:
    if options.faithful:
        return ternary.faithful(adapter, density=density, alpha=options.alpha)
    return ternary.fixed(adapter, density=density)


def _components(signs: Ternary, norm: Tensor) -> Components:
    """The columns that have a sign on both sides, their gains relative to the user's norm and to unit
    sides.
    """
    left, right = signs.B.mT.float(), signs.A.float()
    lengths = left.norm(dim=1) * right.norm(dim=1)
    keep = (lengths > 0) & (signs.gain != 0)
    gain = (signs.gain * lengths / norm.clamp(min=1e-30)).half().float()
    sides = (Side.of_own(left[keep], TERNARY), Side.of_own(right[keep], TERNARY))
    return Components(torch.zeros(int(keep.sum()), dtype=torch.int64), gain[keep], *sides)


def _refined(
    adapter: LoraAdapter, name: str, part: Components, norm: Tensor, whitener: Whitener | None, alpha: float
) -> Components:
    """Gains that leave the least error, in the metric of a whitener if there is one; then times alpha."""
    pair = adapter.pairs[name]
    factors = canonical(pair.B[None].float(), pair.A[None].float(), whitener=whitener)
    made, _ = with_gains(factors, part, (None, None), norm=norm, whitener=whitener)
    return Components(made.user, (made.gain * alpha).half().float(), made.left, made.right)


def _nothing(o: int, i: int) -> Components:
    left, right = (Side.of_own(torch.zeros(0, features), TERNARY) for features in (o, i))
    return Components(torch.zeros(0, dtype=torch.int64), torch.zeros(0), left, right)
