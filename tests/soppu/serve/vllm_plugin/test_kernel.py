"""The compiled kernel at every size of tile and panel, against float64 one token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from soppu.serve.layers import kernels, native, records
from soppu.serve.layers.kernels import Basis
from tests.soppu.compress import handmade

USERS = 5
# Columns of two parts: every width of panel, and a rest that fills none.
SIZES = (16 * (16 + 8 + 4 + 2 + 1) + 3, 48)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if why := native.load():
        pytest.skip(f"no compiled kernel: {why}")


def _basis(k: int, size: int) -> tuple[Basis, Tensor]:
    """A basis of two parts with a gap between them, and the table of cores."""
    spans = torch.tensor([[2, SIZES[0], -1, k, k], [SIZES[0] + 7, SIZES[1], -1, k, k]])
    basis = Basis(torch.randn(size, 2 * k), torch.randn(k * sum(SIZES)), k=(k, k), offset=5, spans=spans)
    cores = torch.randn(USERS + 1, 5 + 2 * k * k)
    cores[-1] = torch.nan  # the row behind all users' is nobody's
    return basis, cores


def _expected(x: Tensor, y: Tensor, basis: Basis, tokens: kernels.Tokens) -> Tensor:
    y, k = y.double(), basis.k[0]
    for number, row in enumerate(tokens.rows.tolist()):
        if row < 0:
            continue
        place = number if tokens.places is None else int(tokens.places[number])
        cores = tokens.cores[row, 5:].double().view(2, k, k)
        inner = (x[place].double() @ basis.V.double()).view(2, k)
        for part, (at, U) in enumerate(basis.outputs()):
            y[place, at : at + U.shape[1]] += inner[part] @ cores[part] @ U.double()
    return y


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("k", [3, 16, 40])
def test_every_number_of_tokens(k: int, picked: bool) -> None:
    torch.manual_seed(k)
    basis, cores = _basis(k, size=37)
    for count in range(1, 20):
        places = torch.randperm(25)[:count].sort().values if picked else None
        tokens = kernels.Tokens(cores, torch.randint(0, USERS, (count,)), places)
        x, y = torch.randn(25, 37), torch.randn(25, SIZES[0] + 7 + SIZES[1] + 1)
        wanted = _expected(x, y, basis, tokens)
        kernels.native(x, y, basis, tokens)
        assert float((y - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("k", [3, 16, 39])
def test_bfloat16_reads_nothing_beside_its_own_numbers(k: int) -> None:
    """Rows of odd length, whose last number has no other beside it, between rows of not-numbers."""
    torch.manual_seed(k)
    basis, cores = _basis(k, size=37)
    half = dataclasses.replace(basis, V=basis.V.bfloat16(), U=basis.U.bfloat16())
    for count in range(1, 18):
        places = 2 * torch.arange(count)
        tokens = kernels.Tokens(cores.bfloat16() / k, torch.randint(-1, USERS, (count,)), places)
        x, y = torch.full((36, 37), torch.nan), torch.full((36, SIZES[0] + 7 + SIZES[1] + 1), torch.nan)
        x[places], y[places] = torch.randn(count, 37), torch.randn(count, y.shape[1])
        x, y = x.bfloat16(), y.bfloat16()
        wanted = _expected(x, y, half, tokens)[places]
        kernels.native(x, y, half, tokens)
        assert float((y[places] - wanted).abs().max()) < 0.01 * float(wanted.abs().max())
        assert y[places + 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_hold_every_number_once_and_zeros_beside(dtype: torch.dtype) -> None:
    matrix = torch.arange(1, 5 * 19 + 1).view(5, 19).to(dtype)
    flat = kernels.panels(matrix)
    deep = 1 if dtype == torch.float32 else 2
    assert len(flat) * flat.element_size() % 64 == 0
    units = -(-5 // deep)
    read = [
        [flat[((c // 16 * units + d // deep) * 16 + c % 16) * deep + d % deep] for c in range(19)]
        for d in range(5)
    ]
    assert torch.tensor(read).equal(matrix.float())
    assert flat.float().sum() == matrix.float().sum()


FORMS = {  # widths of coordinates and own numbers, output side then input side
    "fives": (0, 2, 0, 2),
    "nibbles": (0, 3, 0, 4),
    "bytes": (0, 8, 0, 6),
    "threes": (0, 1, 0, 1),
    "floats": (0, 32, 0, 16),
    "both": (8, 3, 6, 2),
    "one side": (0, 4, 8, 0),
}


def _records(k: int, size: int) -> tuple[records.Records, list[list[tuple[records.Part | None, ...]]]]:
    """Records of users with components of every form at two modules, and their parts."""
    g = torch.Generator().manual_seed(k)
    mixed = [list(FORMS.values()) * 2, [FORMS["fives"]] * 9, [], [FORMS["both"], FORMS["nibbles"]]]
    forms = [*mixed, [FORMS[name] for name in ("bytes", "threes", "one side")]]
    shapes, cuts = [(SIZES[0], size), (SIZES[1], size)], []
    parts = [handmade.components(forms, shape, (k, k), g) for shape in shapes]
    cuts = [(range(o), range(i)) for o, i in shapes]
    held = records.pack(parts, users=USERS, cuts=cuts, ranks=[(k, k)] * 2)
    return held, [[records.unpack(held, user, module) for module in range(2)] for user in range(USERS)]


def _mixed(k: int, size: int) -> tuple[Basis, Tensor, records.Records]:
    basis, cores = _basis(k, size)
    basis.spans[:, 2] = torch.arange(2)
    return basis, cores, _records(k, size)[0]


def _own(part: records.Part, x: Tensor, inner: Tensor, U: Tensor) -> Tensor:
    """What a record adds for a token x (i,) with coordinates `inner` (k_in,), by U (k_out, o): (o,)."""
    right, left = part.q * part.right[:, None], part.p * part.left[:, None]
    weight = right.double() @ x.double() + part.b.double() @ inner
    return weight @ (left.double() + part.a.double() @ U.double())


@pytest.mark.parametrize("kernel", [kernels.native, kernels.plain])
@pytest.mark.parametrize(("k", "size"), [(3, 37), (40, 300)])
def test_records_of_every_form_beside_cores(kernel: kernels.Kernel, k: int, size: int) -> None:
    torch.manual_seed(k)
    basis, cores, held = _mixed(k, size)
    parts = _records(k, size)[1]
    for count in (1, 2, 3, 7, 8, 20):
        rows, users = torch.randint(-1, USERS, (count,)), torch.randint(-1, USERS, (count,)).sort().values
        tokens = kernels.Tokens(torch.cat([cores, 0 * cores[:1]]), rows, None, held, users)
        x, y = torch.randn(count, size), torch.randn(count, SIZES[0] + 7 + SIZES[1] + 1)
        wanted = _expected(x, y, basis, kernels.Tokens(tokens.cores, rows, None))
        for place, user in enumerate(users.tolist()):
            inner = (x[place].double() @ basis.V.double()).view(2, k)
            for number, (at, U) in enumerate(basis.outputs() if user >= 0 else []):
                part = parts[user][number]
                if part is not None:
                    wanted[place, at : at + U.shape[1]] += _own(part, x[place], inner[number], U)
        kernel(x, y, basis, tokens)
        assert float((y - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


RANKS = ((40, 7), (3, 40))  # k_out, k_in of two modules that share an input
COORDINATES = [(4, 2, 6, 2), (8, 2, 4, 0), (4, 0, 8, 2), (6, 3, 4, 1), (32, 2, 16, 0)]


@pytest.mark.parametrize("kernel", [kernels.native, kernels.plain])
def test_parts_of_different_ranks_and_nothing_beyond_a_record_is_read(kernel: kernels.Kernel) -> None:
    g, size = torch.Generator().manual_seed(0), 37
    shapes, forms = [(SIZES[0], size), (SIZES[1], size)], [[form] * 3 for form in COORDINATES]
    parts = [handmade.components(forms, shape, k, g) for shape, k in zip(shapes, RANKS, strict=True)]
    cuts = [(range(o), range(i)) for o, i in shapes]
    held = records.pack(parts, users=len(forms), cuts=cuts, ranks=list(RANKS))
    unknown = torch.full((1024,), -1, dtype=torch.int32)  # as floats, not numbers
    held = dataclasses.replace(held, data=torch.cat([held.data, unknown]))
    sides = [
        (torch.randn(o, k[0], generator=g), torch.randn(i, k[1], generator=g))
        for (o, i), k in zip(shapes, RANKS, strict=True)
    ]
    spans = [(0, SIZES[0], 0), (SIZES[0], SIZES[1], 1)]
    basis = Basis.of(sides, spans, like=torch.zeros(size, 0))
    users = torch.arange(len(forms))
    x, y = torch.randn(len(forms), size, generator=g), torch.zeros(len(forms), sum(SIZES))
    kernel(x, y, basis, kernels.Tokens(torch.zeros(1, 2 * 1600), -torch.ones_like(users), None, held, users))
    for user in users.tolist():
        for (at, width, module), (U, V) in zip(spans, sides, strict=True):
            part = records.unpack(held, user, module)
            wanted = _own(part, x[user], x[user].double() @ V.double(), U.mT)
            assert float((y[user, at : at + width] - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_another_users_infinities_stay_theirs() -> None:
    basis, cores, held = _mixed(3, size=37)
    users = torch.tensor([0, 1, 3, 4, 4, 4])
    tokens = kernels.Tokens(torch.zeros(1, 5 + 2 * 9), torch.full((6,), -1), None, held, users)
    x, y = torch.randn(6, 37), torch.zeros(6, SIZES[0] + 7 + SIZES[1])
    clean = y.clone()
    kernels.native(x, clean, basis, tokens)
    x[1], x[4] = torch.inf, torch.nan
    kernels.native(x, y, basis, tokens)
    assert torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]]) and not torch.isfinite(y[1]).all()


def test_a_token_gets_the_same_bits_in_any_company() -> None:
    torch.manual_seed(0)
    basis, cores = _basis(40, size=64)
    rows, users = torch.randint(-1, USERS, (13,)), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, -1, -1, 3, 3, 4])
    held = _records(40, 64)[0]
    basis.spans[:, 2] = torch.arange(2)
    x, y = torch.randn(13, 64), torch.randn(13, SIZES[0] + 7 + SIZES[1])
    alone = y.clone()
    kernels.native(x, y, basis, kernels.Tokens(cores, rows, None, held, users))
    for number in range(13):
        one = slice(number, number + 1)
        kernels.native(x[one], alone[one], basis, kernels.Tokens(cores, rows[one], None, held, users[one]))
    assert torch.equal(y, alone)
