"""Bundles put together component by component, so that there is one of every form; and their meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.codec.basis import Basis
from soppu.compress.codec.page import Page, PageWriter
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import AXIS, quantise, quantise_coords
from soppu.serve.layers.factors import BundleSlot, ModuleFactors, PairSlot, Slot
from tests.soppu.serve import tiny

# What either side of a component is made of.
KINDS: Mapping[str, tuple[str, str]] = {
    "shared": ("coords", "coords"),
    "axis": ("axis", "coords"),
    "own": ("own", "own"),
    "left": ("coords", "own"),
    "right": ("own", "coords"),
    "both": ("both", "both"),
}
Plan = Sequence[Sequence[str] | None]  # kinds at every module in turn; None = the user does not have it


@dataclass(frozen=True)
class Sizes:
    """Of a bundle: shared ranks (output, input) and users in a page."""

    k_out: int = 6
    k_in: int = 5
    page: int = 2


def bundle(
    shapes: Mapping[str, tuple[int, int]],
    users: Mapping[str, Plan],
    *,
    clusters: Sequence[int] = (),
    sizes: Sizes | None = None,
    seed: int = 0,
) -> Bundle:
    """Random components of the kinds `users` plans, of a size that changes what a tiny model says."""
    sizes, g = sizes or Sizes(), torch.Generator().manual_seed(seed)
    cluster = torch.tensor(clusters or [0] * len(users))
    bases = {
        name: tuple(
            (_basis(o, sizes.k_out, g), _basis(i, sizes.k_in, g)) for _ in range(int(cluster.max()) + 1)
        )
        for name, (o, i) in shapes.items()
    }
    plans = [[plan[m % len(plan)] for m in range(len(shapes))] for plan in users.values()]
    return Bundle(
        users=tuple(users),
        adapter_ids=tuple(f"adapter of {user}" for user in users),
        base_model="tiny",
        base_hash=tiny.BASE_HASH,
        fan_in_fan_out=False,
        shapes=dict(shapes),
        ranks=torch.tensor(
            [
                [0 if kinds is None else max(8, len(kinds)) for kinds in column]
                for column in zip(*plans, strict=True)
            ]
        ),
        bases=bases,
        cluster=cluster,
        norm=20 + 20 * torch.rand(len(users), generator=g),
        pages=_pages(shapes, plans, sizes, g),
        report=_report(shapes, users),
    )


def _pages(
    shapes: Mapping[str, tuple[int, int]],
    plans: Sequence[Plan],
    sizes: Sizes,
    g: torch.Generator,
) -> tuple[Page, ...]:
    writer = PageWriter()
    for place, plan in enumerate(plans):
        parts = [
            _components(kinds or (), shape, sizes, g)
            for kinds, shape in zip(plan, shapes.values(), strict=True)
        ]
        writer.add(parts, users=1)
        if (place + 1) % sizes.page == 0:
            writer.close()
    return writer.close()


def _components(kinds: Sequence[str], shape: tuple[int, int], sizes: Sizes, g: torch.Generator) -> Components:
    m = len(kinds)
    left = [KINDS[kind][0] for kind in kinds]
    right = [KINDS[kind][1] for kind in kinds]
    return Components(
        user=torch.zeros(m, dtype=torch.int64),
        gain=(0.1 + 0.2 * torch.rand(m, generator=g)) * torch.randn(m, generator=g).sign(),
        left=_side(left, shape[0], sizes.k_out, g),
        right=_side(right, shape[1], sizes.k_in, g),
    )


def _side(made_of: Sequence[str], d: int, k: int, g: torch.Generator) -> Side:
    coded = torch.tensor([what in ("coords", "both") for what in made_of], dtype=torch.bool)
    axis = torch.tensor([what == "axis" for what in made_of], dtype=torch.bool)
    own = torch.tensor([what in ("own", "both") for what in made_of], dtype=torch.bool)
    coords = torch.nn.functional.normalize(torch.randn(int(coded.sum()), k, generator=g), dim=1)
    beta = torch.where(own, 1.0, 0.0)
    beta[own & coded] = 0.5
    return Side(
        coords_width=(8 * coded + AXIS * axis).to(torch.uint8),
        own_width=(3 * own).to(torch.uint8),
        axis=torch.arange(len(made_of)) * axis,
        coords=quantise_coords(coords, 8),
        own=quantise(torch.randn(int(own.sum()), d, generator=g), 3),
        beta=beta,
    )


def _basis(d: int, k: int, g: torch.Generator) -> Basis:
    return Basis.make(torch.linalg.qr(torch.randn(d, k, generator=g))[0], 8)


def _report(shapes: Mapping[str, tuple[int, int]], users: Mapping[str, Plan]) -> CompressionReport:
    return CompressionReport(
        method="residual",
        rank=0,
        clusters=1,
        target="",
        whitened=False,
        seed=0,
        device="cpu",
        storage="",
        parameters_before=0,
        parameters_after=0,
        seconds=0.0,
        k_used=dict.fromkeys(shapes, 0),
        steps=dict.fromkeys(shapes, 0),
        relative_error=dict.fromkeys(users, 0.0),
        module_error={name: dict.fromkeys(users, 0.0) for name in shapes},
        certificates=dict.fromkeys(shapes, Certificate(0.0, 0.0, 0.0, 0.0)),
    )


def meaning(made: Bundle, user: str, module: str) -> Tensor:
    """The change (o, i) float64 of one user at one module, from the definition: component by component."""
    index, place = made.index(user), list(made.shapes).index(module)
    bases = made.bases[module][int(made.cluster[index])]
    total = torch.zeros(made.shapes[module], dtype=torch.float64)
    for number, page in enumerate(made.pages):
        if not page.first <= index < page.first + page.users:
            continue
        part = made.components(number)[place]
        for j in (part.user == index).nonzero()[:, 0].tolist():
            sides = zip((part.left, part.right), bases, strict=True)
            left, right = (_vector(side, basis, j) for side, basis in sides)
            total += float(made.norm[index]) * float(part.gain[j]) * torch.outer(left, right)
    return total


def _vector(side: Side, basis: Basis, j: int) -> Tensor:
    """u_j = U a_j + beta_j p_j / ||p_j||."""
    rows = basis.rows.double()
    columns = rows / rows.norm(dim=1, keepdim=True)
    made = torch.zeros(rows.shape[1], dtype=torch.float64)
    if side.coords_width[j] == AXIS:
        made += columns[side.axis[j]]
    elif side.coords_width[j] > 0:
        made += side.coords[int((side.coords_width[:j] > AXIS).sum())].double() @ columns
    if side.own_width[j] > 0:
        own = side.own[int((side.own_width[:j] > 0).sum())].double()
        made += float(side.beta[j]) * own / own.norm()
    return made


def dense(slot: Slot | None, module: str, shape: tuple[int, int]) -> Tensor:
    """The change (o, i) float64 that a slot stands for at one module."""
    if isinstance(slot, BundleSlot):
        if module in slot.modules:
            return _of_factors(slot.modules[module], slot, shape)
    elif isinstance(slot, PairSlot) and module in slot.pairs:
        return slot.pairs[module].B.double() @ slot.pairs[module].A.double()
    return torch.zeros(shape, dtype=torch.float64)


def _of_factors(factors: ModuleFactors, slot: BundleSlot, shape: tuple[int, int]) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64)
    if (place := int(factors.place[slot.index])) >= 0:
        f = factors.shared[slot.cluster]
        core = f.P[place].double() if f.Q is None else f.P[place].double() @ f.Q[place].double()
        total += f.U.double() @ core @ f.V.double().T
    if factors.own is not None and (pair := factors.own.pair(slot.index, slot.cluster)) is not None:
        total += pair.B.double() @ pair.A.double()
    return total
