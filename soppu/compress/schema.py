"""What a bundle's metadata must say, and that its tensors agree. Not for bytes, which `encoding` checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from soppu.compress.options import DTYPES
from soppu.errors import BundleError

_MODULE_KEYS = ("out", "in", "k", "c", "ranks")


def check_metadata(metadata: Mapping[str, Any], source: str) -> None:
    """Every key there, of its type and in its range. Raises BundleError naming the first that is not."""
    rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("users", lambda v: _names(v) and len(set(v)) == len(v) > 0, "a list of different names"),
        ("adapter_ids", lambda v: _names(v) and len(v) == len(metadata["users"]), "one id for each user"),
        ("base_model", lambda v: isinstance(v, str), "a string"),
        ("base_hash", lambda v: isinstance(v, str), "a string"),
        ("fan_in_fan_out", lambda v: isinstance(v, bool), "true or false"),
        ("dtype", lambda v: v in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
        ("modules", lambda v: isinstance(v, dict) and bool(v), "an object with a module or more"),
        ("report", lambda v: isinstance(v, dict), "an object"),
    )
    for key, good, allowed in rules:
        if key not in metadata:
            raise BundleError(f"{source}: metadata lacks {key!r}")
        if not good(metadata[key]):
            found = str(metadata[key])[:60]
            raise BundleError(f"{source}: metadata {key!r} is {found!r}, expected {allowed}")
    for name, entry in metadata["modules"].items():
        _check_module(entry, users=len(metadata["users"]), where=f"{source}: module {name!r}")


def _check_module(entry: Any, *, users: int, where: str) -> None:
    if not isinstance(entry, dict) or any(key not in entry for key in _MODULE_KEYS):
        raise BundleError(f"{where}: expected an object with {', '.join(_MODULE_KEYS)}")
    o, i, k, c, ranks = (entry[key] for key in _MODULE_KEYS)
    if not (_size(o) and _size(i) and _size(k) and k <= min(o, i)):
        raise BundleError(f"{where}: out {o!r}, in {i!r}, k {k!r}; expected 1 <= k <= min(out, in)")
    if not (c is None or (_size(c) and c <= k)):
        raise BundleError(f"{where}: c {c!r}; expected null or 1 to k = {k}")
    if not (isinstance(ranks, list) and len(ranks) == users and all(_size(r, least=0) for r in ranks)):
        raise BundleError(f"{where}: ranks must be a list of {users} integers of 0 or more")


def check_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Exactly the tensors the metadata announces, of its types and shapes, finite. Raises BundleError."""
    expected = _expected(metadata)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BundleError(f"{source}: tensor {missing[0]!r} is missing")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise BundleError(f"{source}: tensor {extra[0]!r} is not one the metadata announces")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise BundleError(f"{source}: tensor {name!r} is {found}, expected {dtype} {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{source}: tensor {name!r} holds NaN or Inf")
    for name, entry in metadata["modules"].items():
        norm, ranks = tensors[f"{name}.norm"], torch.tensor(entry["ranks"])
        if bool((norm < 0).any()) or bool(((norm != 0) & (ranks == 0)).any()):
            raise BundleError(f"{source}: tensor {name + '.norm'!r}: negative, or a norm where the rank is 0")


def _expected(metadata: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    dtype, n = DTYPES[metadata["dtype"]], len(metadata["users"])
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in metadata["modules"].items():
        k, c = entry["k"], entry["c"]
        expected[f"{name}.U"] = (dtype, (entry["out"], k))
        expected[f"{name}.V"] = (dtype, (entry["in"], k))
        expected[f"{name}.P"] = (dtype, (n, k, k if c is None else c))
        if c is not None:
            expected[f"{name}.Q"] = (dtype, (n, c, k))
        expected[f"{name}.norm"] = (torch.float32, (n,))
    return expected


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _size(value: Any, *, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
