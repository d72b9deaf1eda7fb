"""The bundle of three kinds of users says what its users' adapters say."""

from __future__ import annotations

import torch

from benchmarks.mixed import mixed
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle
from soppu.serve.bank import from_bundle


def test_a_third_has_cores_a_third_own_numbers_and_a_third_both() -> None:
    g = torch.Generator().manual_seed(0)
    users = {}
    for number in range(7):
        pair = LoraPair(torch.randn(1, 48, generator=g), torch.randn(64, 1, generator=g))
        users[f"user{number}"] = LoraAdapter({"q": pair}, "tiny", "b" * 64)
    made = Bundle.from_bytes(mixed(users, rank=7, max_error=0.01).to_bytes())
    (factors,) = from_bundle.read(made, cast=lambda _, tensor: tensor).values()
    assert factors.own is not None
    for number, (user, adapter) in enumerate(users.items()):
        part = made.of(user)["q"]
        shared, own = bool((part.left.coords_width > 0).any()), bool(part.own.any())
        assert (shared, own) == [(True, False), (False, True), (True, True)][number % 3]
        assert (factors.own.pair(number) is not None) == own
        assert (int(factors.place[number]) >= 0) == (not own)
        off = made.reconstruct(user).pairs["q"].delta() - adapter.pairs["q"].delta()
        assert float(off.norm()) < 0.02 * float(adapter.pairs["q"].delta().norm())
