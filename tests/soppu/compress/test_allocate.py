from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from soppu.compress.methods.plan import (
    ModulePlan,
    ModuleStats,
    best,
    bisect,
    total_bits,
    user_errors,
)
from soppu.compress.numbers.allocate import Costs, Sides, choose, coords_rate, measure, menu
from soppu.compress.numbers.quantise import QUANTISERS

WIDTHS = tuple(QUANTISERS)


def sides(m: int = 40, seed: int = 0) -> Sides:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(m, generator=generator) ** 4 / m
    rho = torch.rand(2, m, generator=generator)
    return Sides(energy, rho[0], rho[1], torch.ones(m))


@pytest.mark.parametrize("multiplier", [1e-9, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize(("k_out", "k_in"), [(0, 0), (0, 8), (8, 0), (8, 16)])
def test_a_choice_is_near_the_best_of_all_pairs_of_forms(multiplier, k_out, k_in):
    left, right = menu(90, k_out, Costs()), menu(130, k_in, Costs())
    held = sides()
    found = choose(held, left, right, multiplier)
    d_out = left.errors(held.rho_out, torch.ones(40))[:, :, None]
    d_in = right.errors(held.rho_in, torch.ones(40))[:, None, :]
    error = held.energy[:, None, None] * (1 - (1 - d_out) * (1 - d_in))
    cost = error + multiplier * (left.bits[:, None] + right.bits[None, :] + 24)
    least = torch.minimum(cost.flatten(1).amin(1), held.energy)
    made = torch.where(found.keep, found.error + multiplier * found.bits, held.energy)
    assert bool((made >= least - 1e-9).all())
    assert float(made.sum()) <= 1.02 * float(least.sum())


def test_bits_fall_and_errors_rise_with_the_price():
    left, right = menu(64, 8, Costs()), menu(64, 8, Costs())
    made = [choose(sides(), left, right, 10.0**power) for power in range(-10, -2)]
    bits, errors = [float(one.bits.sum()) for one in made], [float(one.error.sum()) for one in made]
    assert bits == sorted(bits, reverse=True) and errors == sorted(errors)
    assert bits[-1] == 0 and errors[-1] == pytest.approx(float(sides().energy.sum()))


def test_components_of_no_energy_are_left_out():
    left = right = menu(64, 0, Costs())
    held = Sides(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
    assert not choose(held, left, right, 1e-12).keep.any()


def test_a_price_for_each_component_is_the_same_as_one_after_the_other():
    left = right = menu(64, 4, Costs())
    held = sides(6)
    prices = torch.tensor([1e-8, 1e-7, 1e-6, 1e-5, 1e-8, 1e-6])
    both = choose(held, left, right, prices)
    for place, price in enumerate(prices.tolist()):
        one = slice(place, place + 1)
        alone = choose(
            Sides(held.energy[one], held.rho_out[one], held.rho_in[one], torch.ones(1)), left, right, price
        )
        assert (int(both.out[place]), int(both.inn[place])) == (int(alone.out[0]), int(alone.inn[0]))


def test_the_costs_of_gaussian_numbers_are_the_table():
    rows = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    found, table = measure([rows]), Costs()
    for width in WIDTHS:
        assert found.rate[width] == pytest.approx(table.rate[width], rel=0.05)
        assert found.distortion[width] == pytest.approx(table.distortion[width], rel=0.12)


def test_rates_rise_and_distortions_fall_with_the_width():
    costs = Costs()
    order = sorted(costs.rate)
    assert [costs.rate[w] for w in order] == sorted(costs.rate.values())
    assert [costs.distortion[w] for w in order] == sorted(costs.distortion.values(), reverse=True)
    assert coords_rate(16, 4) < coords_rate(16, 6) < coords_rate(16, 8)


def stats(n: int, *, shared: float, seed: int = 0) -> ModuleStats:
    """n users of 4 components whose energy lies inside the first 8 directions to a share of `shared`."""
    generator = torch.Generator().manual_seed(seed)
    m = 4 * n
    energy = torch.tensor([0.6, 0.25, 0.1, 0.05]).repeat(n)
    ranks = (0, 4, 8, 16)
    missed = torch.stack(
        [torch.ones(m), torch.full((m,), 1 - shared / 2), *[torch.full((m,), 1 - shared)] * 2], 1
    )
    missed = (missed * (0.9 + 0.1 * torch.rand(m, 1, generator=generator))).clamp(max=1).half()
    user = torch.arange(n).repeat_interleave(4)
    return ModuleStats(256, 256, user, energy, missed, missed, torch.ones(m), ranks)


def plan_for(held: ModuleStats, bits_a_user: float) -> ModulePlan:
    costs, n = Costs(), int(held.user.max()) + 1
    plan = ModulePlan()
    for _ in range(3):
        price = bisect(partial(total_bits, [held], [plan], costs), bits_a_user * n)
        plan = best(held, costs, multiplier=price, share=1.0, start=None)
    return plan


def test_a_basis_is_taken_where_users_are_alike_and_left_where_they_are_not():
    alike, apart = plan_for(stats(50, shared=0.98), 900), plan_for(stats(50, shared=0.02), 900)
    assert alike.k_out == alike.k_in == 8
    assert apart.k_out == apart.k_in == 0


def test_one_user_alone_gets_no_basis():
    plan = plan_for(stats(1, shared=0.98), 900)
    assert plan.k_out == plan.k_in == 0


def test_errors_by_user_add_up_to_those_of_all():
    held, costs = stats(7, shared=0.5), Costs()
    plan = ModulePlan(8, 8, 5, 5)
    each = user_errors([held], [plan], costs, torch.full((7,), 1e-6))
    assert float(each.sum()) == pytest.approx(float(held.pick(plan, costs, 1e-6).error.sum()), rel=1e-5)


def test_bisection_finds_the_least_price_within_the_budget():
    found = bisect(lambda price: 1000 / (1 + math.log10(price) + 20), 100.0)
    assert 1000 / (1 + math.log10(found) + 20) <= 100.0 and found < 10.0**-10.9
