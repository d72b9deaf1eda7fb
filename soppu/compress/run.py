"""Many adapters in, one bundle out. A method's mathematics is in its own module, the file in `bundle`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.fleet import survey as fleets
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.whitening import Whitener, make
from soppu.compress.methods import residual, shared_basis, ternary
from soppu.compress.methods.coding import Fit
from soppu.compress.numbers.errors import LOST, relative_errors
from soppu.compress.options import CompressOptions, ratio
from soppu.config import SHARED_METHODS
from soppu.errors import BundleError


def compress(
    adapters: Mapping[str, LoraAdapter],
    options: CompressOptions,
    *,
    adapter_ids: Mapping[str, str] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compress the adapters of many users into one bundle.

    The errors in its report are those of the numbers as stored. Adapters are held a batch at a time, and
    looked up again in each pass but for those whose canonical forms fit into `passes.ROOM`; so a mapping that
    reads them from disk keeps memory flat.

    Args:
        adapters: user -> adapter, all of one base model. Ranks may differ, and users may lack modules.
        adapter_ids: user -> id the bundle records; by default the registry's id of the adapter's content.
        moments: module -> (i, i) second moments of its input (`soppu.calibrate`); errors are then weighed by
            what they do to the output. Modules not named stay plain.
        progress: called with (what is done, users done, users in all).

    Raises:
        AdapterError: no adapters, a malformed one, or two that do not belong together; both users are named.
        ConfigError: a device this machine does not have.
        BundleError: the target cannot be met, nothing of anybody would be left, or moments fit no module.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, done, total: None)
    fleet = fleets.survey(adapters, adapter_ids=adapter_ids, device=options.torch_device())
    task = _Task(Passes(fleet, _whiteners(fleet, moments or {}, options.shrink)), options)
    bundle = task.bundle(task.fit(tell))
    lost = bundle.report.lost_users
    if lost and len(lost) == int((fleet.norm > 0).sum()):
        raise BundleError(_nothing_left(task, lost, size=len(bundle.to_bytes())))
    report = replace(bundle.report, seconds=time.perf_counter() - started)
    return replace(bundle, report=report)


def _whiteners(fleet: Fleet, moments: Mapping[str, Tensor], shrink: float) -> dict[str, Whitener]:
    for name, C in moments.items():
        if name in fleet.shapes and C.shape[0] != fleet.shapes[name][1]:
            found = f"moments of {C.shape[0]} features, the adapters have {fleet.shapes[name][1]}"
            raise BundleError(f"{name}: {found}; calibrate on the base model of the adapters")
    made = {name: make(moments[name], shrink=shrink) for name in fleet.shapes if name in moments}
    if moments and not made:
        raise BundleError(
            f"moments name {next(iter(moments))!r} and {len(moments) - 1} more modules, none of those the"
            f" adapters change, such as {next(iter(fleet.shapes))!r}; calibrate with these modules"
        )
    return made


def _nothing_left(task: _Task, lost: tuple[str, ...], *, size: int) -> str:
    """Why a bundle is refused, with the smallest size found at which something is kept: fits up to eight."""
    options, fleet = task.options, task.passes.fleet
    names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    said = f"nothing of {names} would be left ({options.method}, target {options.target or 'none'})"
    if not options.target:
        return f"{said}; ask for more, by --density or --rank, or for --max-error"
    for more in (int(size * 2.0**step) for step in range(-4, 4)):
        try:
            allowed = replace(options, ratio=0.0, max_error=0.0, max_bytes=size + more)
            found = replace(task, options=allowed).fit(lambda *_: None)
        except BundleError:
            continue
        if bool((found.squared.sum(0) < (LOST * fleet.norm).square()).any()):
            times = int(100 * ratio(fleet.parameters, size + more)) / 100
            return f"{said}; from {size + more} bytes, a ratio of {times:g}, on something is kept"
    return f"{said}; the file takes {size} bytes even so; ask for --max-error"


@dataclass(frozen=True, eq=False)
class _Task:
    """Makes a fit, and the bundle it is; a fit towards a number of bytes asks for its size on the way."""

    passes: Passes
    options: CompressOptions

    def fit(self, progress: Progress) -> Fit:
        fit = ternary.fit if self.options.method == "ternary" else residual.fit
        fit = shared_basis.fit if self.options.method in SHARED_METHODS else fit
        return fit(self.passes, self.options, size_of=self.size, progress=progress)

    def size(self, fit: Fit) -> int:
        return len(self.bundle(fit).to_bytes())

    def bundle(self, fit: Fit) -> Bundle:
        fleet = self.passes.fleet
        return Bundle(
            users=fleet.users,
            adapter_ids=fleet.adapter_ids,
            base_model=fleet.base_model,
            base_hash=fleet.base_hash,
            fan_in_fan_out=fleet.fan_in_fan_out,
            shapes=fleet.shapes,
            ranks=fleet.ranks,
            bases=fit.bases,
            cluster=fit.cluster,
            norm=fleet.norm.float(),
            pages=fit.pages,
            report=self._report(fit),
        )

    def _report(self, fit: Fit) -> CompressionReport:
        fleet, options = self.passes.fleet, self.options
        errors = relative_errors(fit.squared.sum(0), fleet.norm).tolist()
        tables = relative_errors(fit.squared, fleet.norms)
        return CompressionReport(
            method=options.method,
            rank=options.rank,
            clusters=options.clusters,
            target=str(options.target),
            whitened=bool(self.passes.whiteners),
            seed=options.seed,
            device=fleet.device.type,
            storage=fit.storage,
            parameters_before=fleet.parameters,
            parameters_after=fit.numbers,
            seconds=0.0,
            k_used={name: max(side.k for side in pairs[0]) for name, pairs in fit.bases.items()},
            steps=fit.steps,
            relative_error=dict(zip(fleet.users, errors, strict=True)),
            module_error={
                name: {
                    user: e for user, e, r in zip(fleet.users, row.tolist(), rank.tolist(), strict=True) if r
                }
                for name, row, rank in zip(fleet.shapes, tables, fleet.ranks, strict=True)
            },
            certificates=fit.certificates,
        )
