"""Reads bundles of format 1: one shared basis a module and a core a user, in floats. Nothing writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from soppu.compress.bundle import legacy_schema
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.codec.basis import Basis
from soppu.compress.codec.page import PageWriter
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components, Side, ordinals
from soppu.compress.numbers.quantise import AXIS
from soppu.errors import BundleError


def assemble(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Bundle:
    """The bundle of a format 1 file, in the form of today. O(size).

    Every number is kept as it is, in 32 bits; a user's gains carry the norms of the modules.

    Raises:
        BundleError: the file is not whole, or says what cannot be.
    """
    legacy_schema.check(meta, source)
    legacy_schema.check_tensors(meta, tensors, source)
    names = sorted(meta["modules"])
    norms = torch.stack([tensors[f"{name}.norm"] for name in names]).double()
    whole = norms.square().sum(0).sqrt()
    if not bool(torch.isfinite(whole.float()).all()):
        raise BundleError(f"{source}: the norms of a user's modules add up to more than a float32 holds")
    ranks = torch.tensor([meta["modules"][name]["ranks"] for name in names])
    share = norms / torch.where(whole > 0, whole, 1.0)
    bases, parts = {}, []
    for name, gain, rank in zip(names, share, ranks, strict=True):
        found = {part: tensors[f"{name}.{part}"].float() for part in "UVPQ" if f"{name}.{part}" in tensors}
        bases[name] = ((Basis(32, found["U"].mT.contiguous()), Basis(32, found["V"].mT.contiguous())),)
        parts.append(_components(found, gain.float(), rank))
    try:
        writer = PageWriter()
        writer.add(parts, users=len(meta["users"]))
        pages = writer.close()
    except BundleError as error:
        raise BundleError(f"{source}: {error}") from None
    return Bundle(
        users=tuple(meta["users"]),
        adapter_ids=tuple(meta["adapter_ids"]),
        base_model=meta["base_model"],
        base_hash=meta["base_hash"],
        fan_in_fan_out=meta["fan_in_fan_out"],
        shapes={name: (meta["modules"][name]["out"], meta["modules"][name]["in"]) for name in names},
        ranks=ranks,
        bases=bases,
        cluster=torch.zeros(len(meta["users"]), dtype=torch.int64),
        norm=whole.float(),
        pages=pages,
        report=_report(meta, names),
    )


def _components(tensors: Mapping[str, Tensor], gain: Tensor, ranks: Tensor) -> Components:
    """Every column of P and row of Q is a component; full cores have one for each row, along an axis of U.

    Bases are kept with columns of length 1, so coordinates take their lengths up.
    """
    p, q = tensors["P"], tensors.get("Q")
    out, inn = tensors["U"].norm(dim=0), tensors["V"].norm(dim=0)
    o, i = tensors["U"].shape[0], tensors["V"].shape[0]
    n, k, c = p.shape
    users = torch.arange(n).repeat_interleave(c)
    if q is None:
        left = _side(torch.zeros(0, k), axis=torch.arange(k).repeat(n), d=o)
        right = _side((p * out[:, None] * inn).reshape(n * k, k), d=i)
        keep = gain[users] > 0
    else:
        left = _side((p.mT * out).reshape(n * c, k), d=o)
        right = _side((q * inn).reshape(n * c, k), d=i)
        keep = (gain[users] > 0) & (ordinals(users) < ranks[users])  # those past a user's own rank are zero
    return Components(users, gain[users], left, right).select(keep)


def _side(coords: Tensor, *, d: int, axis: Tensor | None = None) -> Side:
    m = len(coords) if axis is None else len(axis)
    return Side(
        coords_width=torch.full((m,), 32 if axis is None else AXIS, dtype=torch.uint8),
        own_width=torch.zeros(m, dtype=torch.uint8),
        axis=torch.zeros(m, dtype=torch.int64) if axis is None else axis,
        coords=coords,
        own=torch.zeros(0, d),
        beta=torch.zeros(m),
    )


def _report(meta: Mapping[str, Any], names: list[str]) -> CompressionReport:
    report = meta["report"]
    return CompressionReport(
        method=report["method"],
        rank=report["k"],
        clusters=1,
        target="",
        whitened=False,
        seed=report["seed"],
        device=report["device"],
        storage=report["dtype"],
        parameters_before=report["parameters_before"],
        parameters_after=report["parameters_after"],
        seconds=0.0,
        k_used={name: report["k_used"][name] for name in names},
        steps={name: report["steps"][name] for name in names},
        relative_error={user: float(report["relative_error"][user]) for user in meta["users"]},
        module_error={
            name: {user: float(e) for user, e in report["module_error"][name].items()} for name in names
        },
        certificates={name: _certificate(report["certificates"][name]) for name in names},
    )


def _certificate(part: Mapping[str, Any]) -> Certificate:
    # round-off may have left a zero a little below it
    return Certificate(
        *(max(float(part[key]), 0.0) for key in ("lower_bound", "achieved", "upper_bound", "total"))
    )
