"""Many adapters in, one bundle out. A method's mathematics is in its own module, the file in `bundle`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.fleet import survey as fleets
from soppu.compress.fleet.passes import Passes, Progress
from soppu.compress.fleet.survey import Fleet
from soppu.compress.linalg.whitening import make
from soppu.compress.methods import residual, shared_basis, ternary
from soppu.compress.methods.fit import Fit, Question
from soppu.compress.numbers.errors import relative_errors
from soppu.compress.numbers.quantise import QUANTISERS
from soppu.compress.options import SHARED_METHODS, CompressOptions

_FLOAT_WIDTHS = (16, 32)


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
        BundleError: the target cannot be met.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, done, total: None)
    fleet = fleets.survey(adapters, adapter_ids=adapter_ids, device=options.torch_device())
    given = moments or {}
    whiteners = {name: make(given[name], shrink=options.shrink) for name in fleet.shapes if name in given}
    build = _Builder(fleet, options, whitened=bool(whiteners))
    found = _fit(Passes(fleet, whiteners), options, build=build, progress=tell)
    bundle = build.bundle(found)
    report = dataclasses.replace(bundle.report, seconds=time.perf_counter() - started)
    return dataclasses.replace(bundle, report=report)


def _fit(passes: Passes, options: CompressOptions, *, build: _Builder, progress: Progress) -> Fit:
    if options.method in SHARED_METHODS:
        return shared_basis.fit(passes, options, size_of=build.size, progress=progress)
    if options.method == "ternary":
        return ternary.fit(
            passes.fleet, options, whiteners=passes.whiteners, size_of=build.size, progress=progress
        )
    question = Question(
        target=options.target,
        most_rank=0 if options.method == "svd" else options.rank,
        widths=(*QUANTISERS, *_FLOAT_WIDTHS),
        seed=options.seed,
        size_of=build.size,
    )
    return residual.fit(passes, question, progress=progress)


@dataclasses.dataclass(frozen=True, eq=False)
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
