"""Records of users' components: what is packed is what comes back, and no looser than it must be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import QUANTISERS, quantise
from soppu.serve.layers import records
from soppu.serve.layers.records import Part, Records
from tests.soppu.compress.handmade import PLANS, Plan, make

WIDE = {"q": (70, 205), "down": (401, 9)}  # rows that end in the middle of a vector, and of a byte


def packed(bundle: Bundle) -> Records:
    """Page by page, as a server reads it."""
    parts = []
    cuts = [(range(o), range(i)) for o, i in bundle.shapes.values()]
    ranks = [(pairs[0][0].k, pairs[0][1].k) for pairs in bundle.bases.values()]
    for number, page in enumerate(bundle.pages):
        here = torch.arange(len(bundle.users)) - page.first
        scaled = [
            replace(part, gain=part.gain * bundle.norm[part.user]).renumbered(here)
            for part in bundle.components(number)
        ]
        parts.append(records.pack(scaled, users=page.users, cuts=cuts, ranks=ranks))
    return Records.join(parts)


def change(part: Part | None, bundle: Bundle, user: str, module: str) -> Tensor:
    """The whole change (o, i) that a part stands for."""
    if part is None:
        return torch.zeros(bundle.shapes[module])
    left, right = part.p * part.left[:, None], part.q * part.right[:, None]
    U, V = bundle.matrices(module, int(bundle.cluster[bundle.index(user)]))
    left = left if U is None else left + part.a @ U.mT
    return left.mT @ (right if V is None else right + part.b @ V.mT)


@pytest.mark.parametrize("name", PLANS)
def test_every_form_of_component_comes_back(name: str) -> None:
    small = PLANS[name]
    wide = small if "cores" in name else replace(small, shapes=WIDE)
    for plan in (small, wide):
        bundle = make(plan)
        held = packed(bundle)
        assert held.starts[-1] == len(held.data) and len(held.starts) == len(bundle.users) + 1
        assert held.floats == (name == "floats")
        for user in bundle.users:
            pairs = bundle.reconstruct(user).pairs
            for number, module in enumerate(bundle.shapes):
                found = change(records.unpack(held, bundle.index(user), number), bundle, user, module)
                wanted = pairs[module].delta() if module in pairs else torch.zeros(bundle.shapes[module])
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def own(numbers: Tensor, width: int) -> Components:
    """One user's components with the same rows on both sides."""
    side = Side.of_own(numbers, width)
    return Components(torch.zeros(len(numbers), dtype=torch.int64), torch.ones(len(numbers)), side, side)


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 700),
    limit=st.sampled_from([0, 1, 2, 3, 7, 8, 127]),
    rare=st.booleans(),
    seed=st.integers(0, 9),
)
def test_integers_come_back_exactly_whatever_their_size(d: int, limit: int, rare: bool, seed: int) -> None:
    g = Generator().manual_seed(seed)
    numbers = torch.randint(-limit, limit + 1, (3, d), generator=g)
    if rare:  # a few that stick out of four bits
        numbers = numbers.clamp(-7, 7)
        numbers[:, int(torch.randint(0, d, (1,), generator=g))] = -limit
    held = records.pack([own(numbers.float(), 8)], users=1, cuts=[(range(d), range(d))], ranks=[(0, 0)])
    part = records.unpack(held, 0, 0)
    assert part is not None and torch.equal(part.q, numbers.float()) and torch.equal(part.p, part.q)
    assert list(held.components()[0]) == [3]


def test_a_ranks_share_of_the_rows_keeps_the_scale_of_the_whole_rows() -> None:
    bundle = make(Plan([[(8, 4, 8, 5), (0, 3, 0, 2)]], {"q": (48, 64)}, k=(3, 2)))
    (part,) = bundle.components(0)
    whole = records.pack([part], users=1, cuts=[(range(48), range(64))], ranks=[(3, 2)])
    mine = records.pack([part], users=1, cuts=[(range(16, 32), range(32, 64))], ranks=[(3, 2)])
    one, two = records.unpack(whole, 0, 0), records.unpack(mine, 0, 0)
    assert one is not None and two is not None
    assert torch.equal(two.p, one.p[:, 16:32]) and torch.equal(two.q, one.q[:, 32:])
    for name in ("left", "right", "a", "b"):
        assert torch.equal(getattr(two, name), getattr(one, name))


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
def test_a_row_takes_at_most_twice_the_bits_that_its_numbers_carry(width: int) -> None:
    d, g = 2048, Generator().manual_seed(width)
    numbers = quantise(torch.randn(4, d, generator=g), width)
    held = records.pack([own(numbers, width)], users=1, cuts=[(range(d), range(d))], ranks=[(0, 0)])
    assert 32 * len(held.data) / (2 * 4 * d) < 2 * QUANTISERS[width].rate


def test_who_has_nothing_takes_no_room() -> None:
    bundle = make(Plan([[], [(0, 4, 0, 4)], []], {"q": (20, 20)}))
    held = packed(bundle)
    assert np.diff(held.starts.numpy()).tolist()[::2] == [0, 0]
    assert records.unpack(held, 0, 0) is None and records.unpack(held, 1, 0) is not None
