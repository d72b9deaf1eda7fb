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
from soppu.compress.options import SHARED_METHODS, CompressOptions, ratio
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
    whiteners = _whiteners(fleet, moments or {}, options.shrink)
    build = _Builder(fleet, options, whitened=bool(whiteners))
    passes = Passes(fleet, whiteners)
    found = _fit(passes, options, build=build, progress=tell)
    bundle = build.bundle(found)
    lost = bundle.report.lost_users
    if lost and len(lost) == int((fleet.norm > 0).sum()):
        raise BundleError(_nothing_left(passes, build, lost, size=len(bundle.to_bytes())))
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


def _nothing_left(passes: Passes, build: _Builder, lost: tuple[str, ...], *, size: int) -> str:
    """Why a bundle is refused, with the smallest size found at which something is kept: fits up to eight."""
    options, parameters = build.options, passes.fleet.parameters
    names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    said = f"nothing of {names} would be left ({options.method}, target {options.target or 'none'})"
    if not options.target:
        return f"{said}; ask for more, by --density or --rank, or for --max-error"
    for more in (int(size * 2.0**step) for step in range(-4, 4)):
        try:
            allowed = replace(options, ratio=0.0, max_error=0.0, max_bytes=size + more)
            found = _fit(passes, allowed, build=replace(build, options=allowed), progress=lambda *_: None)
        except BundleError:
            continue
        if bool((found.squared.sum(0) < (LOST * passes.fleet.norm).square()).any()):
            times = int(100 * ratio(parameters, size + more)) / 100
            return f"{said}; from {size + more} bytes, a ratio of {times:g}, on something is kept"
    return f"{said}; the file takes {size} bytes even so; ask for --max-error"


def _fit(passes: Passes, options: CompressOptions, *, build: _Builder, progress: Progress) -> Fit:
    fit = ternary.fit if options.method == "ternary" else residual.fit
    fit = shared_basis.fit if options.method in SHARED_METHODS else fit
    return fit(passes, options, size_of=build.size, progress=progress)


@dataclass(frozen=True, eq=False)
class _Builder:
    """Turns a fit into the bundle it is; a fit towards a number of bytes asks for its size on the way."""

    fleet: Fleet
    options: CompressOptions
    whitened: bool

    def size(self, fit: Fit) -> int:
        return len(self.bundle(fit).to_bytes())

    def bundle(self, fit: Fit) -> Bundle:
        fleet = self.fleet
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
        fleet, options = self.fleet, self.options
        errors = relative_errors(fit.squared.sum(0), fleet.norm).tolist()
        tables = relative_errors(fit.squared, fleet.norms)
        present = fleet.ranks > 0
        return CompressionReport(
            method=options.method,
            rank=options.rank,
            clusters=options.clusters,
            target=str(options.target),
            whitened=self.whitened,
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
                    user: error
                    for user, error, has in zip(fleet.users, row.tolist(), here.tolist(), strict=True)
                    if has
                }
                for name, row, here in zip(fleet.shapes, tables, present, strict=True)
            },
            certificates=fit.certificates,
        )
