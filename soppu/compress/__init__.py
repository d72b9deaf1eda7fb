"""Many adapters in, one bundle out. A method's mathematics is in its own module, the file in `bundle`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress import fleet, joint
from soppu.compress.bundle import Bundle, SharedModule
from soppu.compress.metrics import Certificate, CompressionReport, relative_errors, squared_errors
from soppu.compress.options import CompressOptions

__all__ = ["Bundle", "CompressOptions", "compress"]


@dataclass(frozen=True, eq=False)
class _Fitted:
    """One module as it is stored, and what the report says of it. n-sized tensors are float64."""

    module: SharedModule
    ranks: tuple[int, ...]
    squared_error: Tensor
    norm: Tensor
    certificate: Certificate
    steps: int


def compress(
    adapters: Mapping[str, LoraAdapter],
    options: CompressOptions,
    *,
    adapter_ids: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bundle:
    """Compress the adapters of many users into one bundle.

    The errors in its report are those of the tensors as stored, after rounding to `options.dtype`.

    Args:
        adapters: user -> adapter, all of one base model. Ranks may differ, and users may lack modules.
        adapter_ids: user -> id the bundle records; by default the registry's id of the adapter's content.
        progress: called with (modules done, modules in all) after every module.

    Raises:
        AdapterError: no adapters, a malformed one, or two that do not belong together; both users are named.
        ConfigError: a device this machine does not have.
    """
    started = time.perf_counter()
    device = options.torch_device()
    fleet.check(adapters)
    names = sorted({name for adapter in adapters.values() for name in adapter.pairs})
    fitted: dict[str, _Fitted] = {}
    for name in names:
        fitted[name] = _METHODS[options.method](*fleet.factors(adapters, name, device), options)
        if progress is not None:
            progress(len(fitted), len(names))
    first = next(iter(adapters.values()))
    return Bundle(
        users=tuple(adapters),
        adapter_ids=fleet.ids(adapters, adapter_ids),
        base_model=first.base_model,
        base_hash=first.base_hash,
        fan_in_fan_out=first.fan_in_fan_out,
        modules={name: fit.module for name, fit in fitted.items()},
        ranks={name: fit.ranks for name, fit in fitted.items()},
        report=_report(adapters, options, fitted=fitted, seconds=time.perf_counter() - started),
    )


def _joint(outs: list[Tensor], ins: list[Tensor], options: CompressOptions) -> _Fitted:
    fit = joint.fit(outs, ins, rank=options.rank, max_steps=options.max_steps, tolerance=options.tolerance)
    ranks = tuple(int(b.shape[1]) for b in outs)
    p, q = joint.split_cores(fit, ranks)
    module = SharedModule(fit.U, fit.V, p, q, fit.norm).rounded(options.torch_dtype())
    return _Fitted(
        module=module,
        ranks=ranks,
        squared_error=squared_errors(outs, ins, module).cpu(),
        norm=fit.norm.cpu(),
        certificate=Certificate(fit.lower_bound, fit.achieved, fit.upper_bound, fit.total),
        steps=fit.steps,
    )


_METHODS: Mapping[str, Callable[[list[Tensor], list[Tensor], CompressOptions], _Fitted]] = MappingProxyType(
    {"joint": _joint}
)


def _report(
    adapters: Mapping[str, LoraAdapter],
    options: CompressOptions,
    *,
    fitted: Mapping[str, _Fitted],
    seconds: float,
) -> CompressionReport:
    squared = torch.stack([fit.squared_error for fit in fitted.values()]).sum(0)
    norm = torch.stack([fit.norm for fit in fitted.values()]).square().sum(0).sqrt()
    errors = relative_errors(squared, norm).tolist()
    return CompressionReport(
        method=options.method,
        k=options.rank,
        k_used={name: fit.module.k for name, fit in fitted.items()},
        seed=options.seed,
        seconds=seconds,
        device=options.torch_device().type,
        dtype=options.dtype,
        steps={name: fit.steps for name, fit in fitted.items()},
        relative_error=dict(zip(adapters, errors, strict=True)),
        module_error={name: _module_errors(tuple(adapters), fit) for name, fit in fitted.items()},
        certificates={name: fit.certificate for name, fit in fitted.items()},
        parameters_before=sum(adapter.parameters() for adapter in adapters.values()),
        parameters_after=sum(fit.module.parameters() for fit in fitted.values()),
    )


def _module_errors(users: tuple[str, ...], fit: _Fitted) -> dict[str, float]:
    errors = relative_errors(fit.squared_error, fit.norm).tolist()
    return {user: error for user, error, r in zip(users, errors, fit.ranks, strict=True) if r}
