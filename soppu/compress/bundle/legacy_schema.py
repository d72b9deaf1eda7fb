"""What a bundle of format 1 must say, and that its tensors agree. `legacy` makes a bundle of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from soppu.compress.bundle.schema import MOST_FEATURES, MOST_U16, names, show, whole
from soppu.compress.codec.streams import LARGEST_FLOAT
from soppu.errors import BundleError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
)
_MODULE_KEYS = ("out", "in", "k", "c", "ranks")
_MOST_NUMBER = 2.0**100
_CERTIFICATE = ("lower_bound", "achieved", "upper_bound", "total")


def check(meta: Mapping[str, Any], source: str) -> None:
    """Every key there, of its type and in its range. Raises BundleError naming the first that is not."""
    rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("users", lambda v: names(v) and len(set(v)) == len(v) > 0, "a list of different names"),
        ("adapter_ids", lambda v: names(v) and len(v) == len(meta["users"]), "one id for each user"),
        ("base_model", lambda v: isinstance(v, str), "a string"),
        ("base_hash", lambda v: isinstance(v, str), "a string"),
        ("fan_in_fan_out", lambda v: isinstance(v, bool), "true or false"),
        ("dtype", lambda v: v in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
        ("modules", lambda v: isinstance(v, dict) and bool(v) and all(v), "an object with a module or more"),
        ("report", lambda v: isinstance(v, dict), "an object"),
    )
    for key, good, allowed in rules:
        if key not in meta:
            raise BundleError(f"{source}: metadata lacks {key!r}")
        if not good(meta[key]):
            raise BundleError(f"{source}: metadata {key!r} is {show(meta[key])}, expected {allowed}")
    for name, entry in meta["modules"].items():
        _check_module(entry, users=len(meta["users"]), where=f"{source}: module {show(name)}")
    has = [any(entry["ranks"][n] for entry in meta["modules"].values()) for n in range(len(meta["users"]))]
    if not all(has):
        raise BundleError(f"{source}: user {show(meta['users'][has.index(False)])} has no module")
    if (fault := _settings_fault(meta) or _tables_fault(meta)) is not None:
        raise BundleError(f"{source}: report: {fault}")


def check_tensors(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Exactly the tensors the metadata announces, of its types and shapes, finite. Raises BundleError."""
    expected = _expected(meta)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BundleError(f"{source}: tensor {show(missing[0])} is missing")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise BundleError(f"{source}: tensor {show(extra[0])} is not one the metadata announces")
    for name, (dtype, shape) in expected.items():
        tensor, where = tensors[name], f"{source}: tensor {show(name)}"
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise BundleError(f"{where} is {found}, expected {dtype} {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{where} holds NaN or Inf")
        if not name.endswith(".norm") and bool((tensor.abs() > LARGEST_FLOAT).any()):
            raise BundleError(f"{where} holds a number beyond {LARGEST_FLOAT:g}")
    for name, entry in meta["modules"].items():
        norm, ranks = tensors[f"{name}.norm"], torch.tensor(entry["ranks"])
        if bool((norm < 0).any()) or bool(((norm != 0) & (ranks == 0)).any()):
            where = f"{source}: tensor {show(name + '.norm')}"
            raise BundleError(f"{where}: negative, or a norm where the rank is 0")


def _check_module(entry: Any, *, users: int, where: str) -> None:
    if not isinstance(entry, dict) or any(key not in entry for key in _MODULE_KEYS):
        raise BundleError(f"{where}: expected an object with {', '.join(_MODULE_KEYS)}")
    o, i, k, c, ranks = (entry[key] for key in _MODULE_KEYS)
    sizes = whole(o, 1, MOST_FEATURES) and whole(i, 1, MOST_FEATURES)
    if not (sizes and whole(k, 1, min(o, i, MOST_U16))):
        found = f"out {show(o)}, in {show(i)}, k {show(k)}"
        raise BundleError(f"{where}: {found}; expected 1 <= k <= min(out, in)")
    if not (c is None or whole(c, 1, k)):
        raise BundleError(f"{where}: c {show(c)}; expected null or 1 to k = {k}")
    if not (isinstance(ranks, list) and len(ranks) == users and all(whole(r, 0, MOST_U16) for r in ranks)):
        raise BundleError(f"{where}: ranks must be a list of {users} integers of 0 or more")


def _expected(meta: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    dtype, n = DTYPES[meta["dtype"]], len(meta["users"])
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, entry in meta["modules"].items():
        k, c = entry["k"], entry["c"]
        expected[f"{name}.U"] = (dtype, (entry["out"], k))
        expected[f"{name}.V"] = (dtype, (entry["in"], k))
        expected[f"{name}.P"] = (dtype, (n, k, k if c is None else c))
        if c is not None:
            expected[f"{name}.Q"] = (dtype, (n, c, k))
        expected[f"{name}.norm"] = (torch.float32, (n,))
    return expected


def _settings_fault(meta: Mapping[str, Any]) -> str | None:
    """What is wrong in the report with what is said of the whole, in words."""
    report = meta["report"]
    for key in ("method", "device"):
        if not isinstance(report.get(key), str):
            return f"{key!r} is {show(report.get(key))}, expected a string"
    for key in ("k", "seed", "parameters_before", "parameters_after"):
        if not whole(report.get(key), 0):
            return f"{key!r} is {show(report.get(key))}, expected an integer of 0 or more"
    if report.get("dtype") != meta["dtype"]:
        return f"'dtype' is {show(report.get('dtype'))}, the bundle's is {meta['dtype']}"
    return None


def _tables_fault(meta: Mapping[str, Any]) -> str | None:
    """What is wrong in the report with what is said of modules and users, in words."""
    report, modules, users = meta["report"], meta["modules"].keys(), set(meta["users"])
    for key in ("k_used", "steps", "module_error", "certificates"):
        if not (isinstance(report.get(key), dict) and report[key].keys() == modules):
            return f"{key!r} does not have the modules of the bundle"
    if not all(whole(value, 0) for key in ("k_used", "steps") for value in report[key].values()):
        return "a rank or a number of steps is not an integer of 0 or more"
    if not (_errors(report.get("relative_error")) and report["relative_error"].keys() == users):
        return "'relative_error' does not have a number of 0 or more for each of the users"
    if not all(_errors(part) and part.keys() <= users for part in report["module_error"].values()):
        return "'module_error' has other than numbers of 0 or more for users"
    if not all(_certificate(part) for part in report["certificates"].values()):
        return f"a certificate is not {', '.join(_CERTIFICATE)}, finite numbers"
    return None


def _errors(value: object) -> bool:
    return isinstance(value, dict) and all(_number(x) and 0 <= x <= LARGEST_FLOAT for x in value.values())


def _certificate(value: object) -> bool:
    return isinstance(value, dict) and all(_number(value.get(key)) for key in _CERTIFICATE)


def _number(value: object) -> bool:
    """Whether it is a number, of a size that certificates of today can hold in 32 bits."""
    return type(value) in (int, float) and abs(value) <= _MOST_NUMBER  # type: ignore[arg-type]
