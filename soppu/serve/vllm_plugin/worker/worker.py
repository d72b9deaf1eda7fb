"""What the frontend may ask of a worker, by name; all of it runs between two forward passes.

Arguments are strings and numbers: tensors go through files, which every worker of a server can read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors.torch import load_file

from soppu.compress.bundle.shelf import Shelf
from soppu.compress.numbers.components import Components, Side
from soppu.errors import BundleError
from soppu.serve.bank.resident import DEFAULT_RESIDENT
from soppu.serve.layers.kernels import Kernel, Ranks
from soppu.serve.vllm_plugin.worker import resident, step
from soppu.serve.vllm_plugin.worker.resident import Form, Linear, Resident
from soppu.serve.vllm_plugin.worker.static import Limits, StaticStep
from soppu.serve.vllm_plugin.worker.step import Residents, Step

_RANKS = (16, 32, 64, 128)  # what the ranks of bases are padded to where nobody has cores


class Worker:
    """The bundles of one worker process. The layers prepared are those that the bundles of its start adapt.

    Args:
        linears: every linear layer of the engine.
        how: the kernel, or the sizes of the buffers of an engine that records its passes and replays them.
        bundles: those served from the start, in the order of their rows.
        limit: bytes of users that are kept in memory, beside those in the batch.

    Raises:
        BundleError: a module that the engine does not have.
    """

    def __init__(
        self,
        linears: Sequence[Linear],
        how: Kernel | Limits,
        form: Form,
        *,
        bundles: Sequence[Shelf],
        limit: int = DEFAULT_RESIDENT,
    ) -> None:
        self._form, self._ahead = form, False
        shapes: dict[str, tuple[int, int]] = {}
        for bundle in bundles:
            chosen = _chosen(linears, bundle, who=f"bundle {bundle.bundle_id[:12]}")
            shapes |= {part.module: part.shape for line in chosen for part in line.parts}
        chosen = adapted(linears, shapes, who="the bundles")
        starts = list(accumulate((len(one.users) + form.spare for one in bundles), initial=form.start))
        self._began = [(one.bundle_id, start) for one, start in zip(bundles, starts, strict=False)]

        def built() -> list[Resident]:
            each = zip(bundles, starts, strict=False)
            return [resident.build(one, chosen, replace(self._form, start=start)) for one, start in each]

        residents = built()
        self.step: Residents
        if isinstance(how, Limits):
            self._form = replace(form, ranks=_ranks(residents))
            self.step = StaticStep(chosen, built(), how, limit=limit)
        else:
            self.step = Step(chosen, how, limit=limit)
            for one in residents:
                self.step.add(one)
        step.serve(self.step)

    def read_ahead(self) -> int:
        """From now on, read users before they ask, as many as may stay in memory. How many bundles it has."""
        self._ahead = True
        for start in self.step.residents:
            self.step.read_ahead(start)
        return len(self.step.residents)

    def stage(self, path: str, bundle_id: str, start: int) -> int:
        """Load a bundle file beside what is there; the number of its rows.

        Raises:
            BundleError: another file than the id names, modules not prepared for.
        """
        bundle, who = Shelf.open(Path(path), expected_hash=bundle_id), f"bundle {bundle_id[:12]}"
        prepared = {part.module for linear in self.step.linears for part in linear.parts}
        unprepared = bundle.shapes.keys() - prepared
        if unprepared and (missing := sorted(unprepared & bundle.survey.changed)):
            raise BundleError(
                f"{who}: {missing[0]} is not among the {len(prepared)} modules this server was started with;"
                " restart it with SOPPU_BUNDLE naming this bundle"
            )
        shapes = {name: shape for name, shape in bundle.shapes.items() if name in prepared}
        adapted(self.step.linears, shapes, who=who)
        staged = resident.build(bundle, self.step.linears, replace(self._form, start=start))
        self.step.add(staged)
        if self._ahead:
            self.step.read_ahead(start)
        return staged.rows

    def drop(self, start: int) -> int:
        """Free the bundle whose first row is `start`; no request may be on it. How many bundles stay."""
        self.step.drop(start)
        return len(self.step.residents)

    def put(self, start: int, row: int, cluster: int, path: str) -> int:
        """Write the cores of a runtime adapter, module -> (k_out, k_in) in a safetensors file, to a row."""
        self.step.exchange(self.step.at(start).put(row - start, load_file(path), cluster=cluster))
        return row

    def put_own(self, start: int, row: int, path: str) -> int:
        """As `put` for own numbers: module.p (c, o) and module.q (c, i) int8, module.gain (c,)."""
        tensors, held = load_file(path), self.step.at(start)
        own = {}
        for name in {key.rpartition(".")[0] for key in tensors}:
            sides = (Side.of_own(tensors[f"{name}.{side}"].float(), 8) for side in "pq")
            gain = tensors[f"{name}.gain"]
            own[name] = Components(torch.zeros(len(gain), dtype=torch.int64), gain, *sides)
        self.step.exchange(held.with_own(row - start, own))
        return row

    def keeps_own(self, start: int) -> bool:
        """Whether anybody in the bundle has numbers of their own, so that an adapter may have some too."""
        return bool(self.step.at(start).shelf.survey.own.any())

    def figures(self) -> dict[str, int]:
        """How many rows are in memory, in which bytes, and what came and went."""
        return asdict(self.step.table.figures())

    def began(self) -> list[tuple[str, int]]:
        """Ids of the bundles that were there from the start, each with its first row."""
        return self._began


def _chosen(linears: Sequence[Linear], bundle: Shelf, *, who: str) -> list[Linear]:
    """The layers of the bundle's modules: also of those that nobody changes, as somebody may in the next one.

    A module that the engine lacks is refused where somebody changes it, as `adapted` says.
    """
    known = {part.module for linear in linears for part in linear.parts}
    lacking = bundle.shapes.keys() - known
    changed = bundle.survey.changed & lacking if lacking else lacking
    shapes = {name: shape for name, shape in bundle.shapes.items() if name in known or name in changed}
    return adapted(linears, shapes, who=who)


def _ranks(residents: Sequence[Resident]) -> dict[str, Ranks]:
    """The ranks there is room for: what bundles need, or more where that costs no user a byte."""
    has_cores = any(one.shelf.survey.cored.any() for one in residents)
    ranks = {}
    for name in residents[0].bases:
        out, inn = (max(one.bases[name][0].k[side] for one in residents) for side in (0, 1))
        ranks[name] = (out, inn) if has_cores else (_padded(out), _padded(inn))
    return ranks


def _padded(rank: int) -> int:
    return next((size for size in _RANKS if size >= rank), rank)


def adapted(linears: Sequence[Linear], shapes: Mapping[str, tuple[int, int]], *, who: str) -> list[Linear]:
    """The layers that the modules in `shapes` lie in, each with those parts alone, sorted by name.

    Raises:
        BundleError: a module that no layer holds, or that has another shape there; the message names it.
    """
    held = {part.module: part for linear in linears for part in linear.parts}
    for name, shape in shapes.items():
        if name not in held:
            raise BundleError(
                f"{who}: {name}: the engine has no such linear layer; it has {len(held)}, among them"
                f" {', '.join(sorted(held)[:3])}"
            )
        if held[name].shape != shape:
            raise BundleError(f"{who}: {name}: shape {shape}, the base model has {held[name].shape}")
    chosen = (replace(line, parts=tuple(p for p in line.parts if p.module in shapes)) for line in linears)
    return sorted((line for line in chosen if line.parts), key=lambda line: line.name)
