"""What a bundle's metadata must say, and that its tensors agree; `envelope` checks the bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as show  # short, however large or deep the value is
from typing import Any, TypeGuard

import torch
from torch import Tensor

from soppu.compress.bundle.report import SETTINGS
from soppu.compress.numbers.quantise import FLOATS, QUANTISERS
from soppu.errors import BundleError

MOST_FEATURES = 1 << 24  # of a module: far above any, and small enough that a lie about it does no harm
MOST_U16 = (1 << 16) - 1  # ranks and clusters are kept in 16 bits
_MOST_INTEGER = (1 << 64) - 1
_MODULE_KEYS = ("name", "out", "in", "k", "widths")
_WIDTHS = (*QUANTISERS, *FLOATS)
_BYTES = ("meta", "bases", "ranks", "cluster")


def check(meta: Mapping[str, Any], source: str) -> None:
    """Every key there, of its type and in its range. Raises BundleError naming the first that is not."""
    rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("users", lambda v: names(v) and len(set(v)) == len(v) > 0, "a list of different names"),
        ("adapter_ids", lambda v: names(v) and len(v) == len(meta["users"]), "one id for each user"),
        ("base_model", lambda v: isinstance(v, str), "a string"),
        ("base_hash", lambda v: isinstance(v, str), "a string"),
        ("fan_in_fan_out", lambda v: isinstance(v, bool), "true or false"),
        ("basis_saw", names, "a list of ids"),
        ("clusters", lambda v: whole(v, 1, MOST_U16), f"an integer from 1 to {MOST_U16}"),
        (
            "pages",
            lambda v: _wholes(v, 1) and sum(v) == len(meta["users"]),
            "integers of 1 or more that add up to the users",
        ),
        ("modules", lambda v: isinstance(v, list) and bool(v), "a list with a module or more"),
        ("report", lambda v: isinstance(v, dict), "an object"),
    )
    for key, good, allowed in rules:
        if key not in meta:
            raise BundleError(f"{source}: metadata lacks {key!r}")
        if not good(meta[key]):
            raise BundleError(f"{source}: metadata {key!r} is {show(meta[key])}, expected {allowed}")
    for place, entry in enumerate(meta["modules"]):
        _check_module(entry, clusters=meta["clusters"], where=f"{source}: module {place}")
    narrow = min(min(entry["k"]) for entry in meta["modules"])
    if not whole(meta.get("common", 0), 0, narrow):
        raise BundleError(
            f"{source}: metadata 'common' is {show(meta['common'])}, expected an integer from 0 to {narrow},"
            " the least rank of a basis"
        )
    if len({entry["name"] for entry in meta["modules"]}) < len(meta["modules"]):
        raise BundleError(f"{source}: two modules of one name")
    _check_report(meta["report"], modules=len(meta["modules"]), source=source)


def check_tensors(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Exactly the tensors the metadata announces, of their types and shapes, finite. Raises BundleError."""
    n, modules = len(meta["users"]), len(meta["modules"])
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        "norm": (torch.float32, (n,)),
        "error": (torch.float32, (n,)),
        "module_error": (torch.float16, (modules, n)),
        "certificates": (torch.float32, (modules, 5)),
    }
    expected |= {name: (torch.uint8, None) for name in _BYTES}
    expected |= {f"page.{number}": (torch.uint8, None) for number in range(len(meta["pages"]))}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BundleError(f"{source}: tensor {missing[0]!r} is missing")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise BundleError(f"{source}: tensor {show(extra[0])} is not one the metadata announces")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        fits = tuple(tensor.shape) == shape if shape else tensor.ndim == 1
        if tensor.dtype != dtype or not fits:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise BundleError(f"{source}: tensor {name!r} is {found}, expected {dtype} {shape or '(bytes,)'}")
        if tensor.is_floating_point() and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise BundleError(f"{source}: tensor {name!r} holds a negative number, NaN or Inf")
    if bool((tensors["certificates"][:, 4] > 1).any()):
        raise BundleError(f"{source}: tensor 'certificates' holds a probability above 1")


def check_members(meta: Mapping[str, Any], ranks: Tensor, cluster: Tensor, source: str) -> None:
    """Clusters exist, and every user has a module. Raises BundleError."""
    if int(cluster.max()) >= meta["clusters"]:
        raise BundleError(f"{source}: cluster {int(cluster.max())}, there are {meta['clusters']}")
    if bool((none := ranks.sum(0) == 0).any()):
        raise BundleError(f"{source}: user {show(meta['users'][int(none.nonzero()[0])])} has no module")


def names(value: object) -> bool:
    """Whether it is a list of strings that are not empty."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def whole(value: object, least: int, most: int = _MOST_INTEGER) -> bool:
    """Whether it is an integer in a range; True and 1.0 are not."""
    return type(value) is int and least <= value <= most


def _check_module(entry: Any, *, clusters: int, where: str) -> None:
    if not isinstance(entry, dict) or any(key not in entry for key in _MODULE_KEYS):
        raise BundleError(f"{where}: expected an object with {', '.join(_MODULE_KEYS)}")
    name, o, i, k, widths = (entry[key] for key in _MODULE_KEYS)
    if not (isinstance(name, str) and name):
        raise BundleError(f"{where}: name {show(name)}, expected a string that is not empty")
    if not (whole(o, 1, MOST_FEATURES) and whole(i, 1, MOST_FEATURES)):
        raise BundleError(
            f"{where}: out {show(o)}, in {show(i)}; expected integers from 1 to {MOST_FEATURES}"
        )
    if not (_wholes(k, 0) and len(k) == 2 and k[0] <= o and k[1] <= i):
        raise BundleError(f"{where}: k {show(k)}, expected two integers, from 0 to out {o} and to in {i}")
    good = isinstance(widths, list) and len(widths) == clusters
    if not (good and all(_pair_of_widths(pair, k) for pair in widths)):
        raise BundleError(
            f"{where}: widths {show(widths)}, expected {clusters} pairs of {_WIDTHS}, 0 for k = 0"
        )


def _pair_of_widths(pair: Any, k: list[int]) -> bool:
    fits = _wholes(pair, 0) and len(pair) == 2
    return fits and all(w in _WIDTHS if rank else w == 0 for w, rank in zip(pair, k, strict=True))


def _check_report(report: Mapping[str, Any], *, modules: int, source: str) -> None:
    for key, kind in SETTINGS.items():
        if key not in report or type(report[key]) is not kind or kind is int and not whole(report[key], 0):
            found = show(report.get(key))
            raise BundleError(f"{source}: report: {key!r} is {found}, expected {kind.__name__} of 0 or more")
    steps = report.get("steps")
    if not (_wholes(steps, 0) and len(steps) == modules):
        raise BundleError(f"{source}: report: steps must be a list of {modules} integers of 0 or more")


def _wholes(values: object, least: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(whole(value, least) for value in values)
