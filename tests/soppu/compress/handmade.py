"""Small bundles of every kind the format knows, made by hand: for the fuzzer and for tests.

Widths are given and numbers are random: no method decides anything, and every mode of a component comes up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from soppu.compress import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.codec.basis import Bases, Basis
from soppu.compress.codec.page import PageWriter
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import AXIS, COORDS, FLOATS, QUANTISERS, TERNARY

Form = tuple[int, int, int, int]  # widths: coordinates and own numbers, output side then input side


@dataclass(frozen=True)
class Plan:
    """What a handmade bundle is made of.

    Attributes:
        forms: user -> form of each component; the same at every module. AXIS needs the first k components.
        shapes: module -> (o, i).
        k: ranks of the bases, output and input side, at every module.
        widths: of the bases' numbers.
        clusters: bases a module has; user n is in cluster n modulo this.
        pages: users of each page; () for one page.
        lacking: (user, module) pairs that are not there.
    """

    forms: Sequence[Sequence[Form]]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"q": (7, 5), "down": (4, 9)})
    k: tuple[int, int] = (0, 0)
    widths: tuple[int, int] = (5, 8)
    clusters: int = 1
    pages: tuple[int, ...] = ()
    lacking: frozenset[tuple[int, str]] = frozenset()


PLANS: Mapping[str, Plan] = {
    "own": Plan([[(0, 3, 0, 2), (0, 4, 0, 5)], [(0, 6, 0, 8)]]),
    "coordinates": Plan([[(4, 0, 6, 0), (8, 0, 8, 0)], [(8, 0, 4, 0)]], k=(3, 2)),
    "both": Plan([[(8, 4, 0, 5), (6, 3, 8, 2)], [(0, 4, 6, 0), (4, 0, 0, 3)]], k=(2, 3), widths=(2, 3)),
    "floats": Plan([[(16, 32, 32, 0)], [(0, 16, 0, 32)]], k=(2, 2), widths=(16, 32)),
    "ternary": Plan([[(0, TERNARY, 0, TERNARY)], [(0, TERNARY, 0, 4)]]),
    "full cores": Plan([[(AXIS, 0, 8, 0)] * 3, [(AXIS, 0, 4, 0)] * 3], k=(3, 2), widths=(4, 6)),
    "diagonal cores": Plan([[(AXIS, 0, AXIS, 0)] * 3] * 2, k=(3, 3)),
    "two clusters": Plan([[(8, 0, 8, 0)], [(6, 4, 6, 0)], [(8, 0, 8, 0)]], k=(2, 2), clusters=2),
    "pages": Plan([[(0, 4, 0, 4)], [], [(0, 3, 0, 3)]], pages=(2, 1), lacking=frozenset({(2, "q")})),
}


def make(plan: Plan, *, seed: int = 0) -> Bundle:
    """The bundle of a plan, with random numbers. O(size)."""
    generator = torch.Generator().manual_seed(seed)
    users = [f"user{n}" for n in range(len(plan.forms))]
    absent = [[(n, name) in plan.lacking for n in range(len(users))] for name in plan.shapes]
    present = ~torch.tensor(absent)
    writer, first = PageWriter(), 0
    for count in plan.pages or (len(users),):
        parts = []
        for shape, here in zip(plan.shapes.values(), present.tolist(), strict=True):
            forms = [form if has else () for form, has in zip(plan.forms, here, strict=True)]
            parts.append(components(forms[first : first + count], shape, plan.k, generator))
        writer.add(parts, users=count)
        writer.close()
        first += count
    ranks = present * torch.tensor([max(len(form), 1) for form in plan.forms])
    return Bundle(
        users=tuple(users),
        adapter_ids=tuple(f"a-{n}" for n in range(len(users))),
        base_model="tiny",
        base_hash="b" * 64,
        fan_in_fan_out=False,
        shapes=dict(plan.shapes),
        ranks=ranks,
        bases={name: _bases(shape, plan, generator) for name, shape in plan.shapes.items()},
        cluster=torch.arange(len(users)) % plan.clusters,
        norm=torch.rand(len(users), generator=generator) + 0.5,
        pages=writer.close(),
        report=_report(plan, users, present),
    )


def components(
    forms: Sequence[Sequence[Form]], shape: tuple[int, int], k: tuple[int, int], generator: Generator
) -> Components:
    """Random components at a module of `shape` = (o, i), as stored: a page gives them back as they are."""
    user = torch.tensor([n for n, form in enumerate(forms) for _ in form], dtype=torch.int64)
    place = torch.tensor([j for form in forms for j in range(len(form))], dtype=torch.int64)
    widths = torch.tensor([one for form in forms for one in form], dtype=torch.uint8).reshape(-1, 4)
    left = _side(widths[:, :2], place, (shape[0], k[0]), generator)
    right = _side(widths[:, 2:], place, (shape[1], k[1]), generator)
    return Components(user, torch.randn(len(user), generator=generator).half().float(), left, right)


def _side(widths: Tensor, place: Tensor, sizes: tuple[int, int], generator: Generator) -> Side:
    coords_width, own_width = widths[:, 0], widths[:, 1]
    coded, has, (d, k) = coords_width > AXIS, own_width > 0, sizes
    both = (coords_width > 0) & has
    return Side(
        coords_width=coords_width,
        own_width=own_width,
        axis=torch.where(coords_width == AXIS, place, 0),
        coords=_rows([_coords(w, k, generator) for w in coords_width[coded].tolist()], k),
        own=_rows([_own(w, d, generator) for w in own_width[has].tolist()], d),
        beta=torch.where(both, torch.rand(len(place), generator=generator).half().float(), has.float()),
    )


def _rows(rows: list[Tensor], columns: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, columns)


def _coords(width: int, k: int, generator: Generator) -> Tensor:
    if width in FLOATS:
        return torch.randn(k, generator=generator).to(FLOATS[width]).float()
    return torch.randint(-COORDS[width], COORDS[width] + 1, (k,), generator=generator).float() / COORDS[width]


def _own(width: int, d: int, generator: Generator) -> Tensor:
    if width in FLOATS:
        return torch.randn(d, generator=generator).to(FLOATS[width]).float()
    limit = 1 if width == TERNARY else QUANTISERS[width].limit
    return torch.randint(-limit, limit + 1, (d,), generator=generator).float()


def _bases(shape: tuple[int, int], plan: Plan, generator: Generator) -> tuple[Bases, ...]:
    def one(side: int) -> Basis:
        return Basis.make(torch.randn(shape[side], plan.k[side], generator=generator), plan.widths[side])

    return tuple((one(0), one(1)) for _ in range(plan.clusters))


def _report(plan: Plan, users: list[str], present: Tensor) -> CompressionReport:
    return CompressionReport(
        method="by hand",
        rank=max(plan.k),
        clusters=plan.clusters,
        target="",
        whitened=False,
        seed=0,
        device="cpu",
        storage="as the plan says",
        parameters_before=1000,
        parameters_after=100,
        seconds=0.0,
        k_used={name: max(plan.k) for name in plan.shapes},
        steps={name: n for n, name in enumerate(plan.shapes)},
        relative_error={user: 0.25 for user in users},
        module_error={
            name: {user: 0.5 for user, here in zip(users, row, strict=True) if here}
            for name, row in zip(plan.shapes, present.tolist(), strict=True)
        },
        certificates={name: Certificate(0.1, 0.2, 0.4, 2.0) for name in plan.shapes},
    )
