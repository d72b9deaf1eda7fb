"""The mean of what is shared, by every rule: against the dense one, against hostile users, and with noise."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum
from torch import Tensor

from clients import privacy as client
from server.aggregate import Reply, averaged, refit
from soppu.adapter import LoraPair
from soppu.errors import ConfigError
from soppu.federation import privacy, wire
from soppu.sharing import SharingSettings
from tests.soppu.test_wire import SHAPES, make
from tests.thorough import thorough

USERS = ("ann", "bob", "cleo", "dan", "eve", "finn", "gil")
EXAMPLES = {"ann": 30, "bob": 10, "cleo": 60, "dan": 5, "eve": 20, "finn": 8, "gil": 12}
State = dict[str, Tensor]


def start() -> State:
    return wire.to_state(make(seed=100))


def replies(users: tuple[str, ...] = USERS, *, hostile: str = "", factor: float = 1.0) -> dict[str, Reply]:
    """Users who agree on a direction and differ around it; one goes the other way, `factor` times as far."""
    begun, towards = start(), wire.to_state(make(seed=50))
    found = {}
    for number, user in enumerate(users):
        own = wire.to_state(make(seed=number))
        sign = -factor if user == hostile else 1.0
        found[user] = Reply(
            {name: begun[name] + sign * (0.1 * towards[name] + 0.03 * own[name]) for name in begun},
            EXAMPLES[user],
        )
    return found


def change(state: State, begun: State | None = None) -> Tensor:
    begun = begun or start()
    return torch.cat([(state[name] - begun[name]).flatten() for name in sorted(state)])


def mean(given: dict[str, Reply], **settings: Any) -> State:
    return averaged(start(), given, SharingSettings(**settings))[0]


# ---- Flower's rules


def flower(rule: FedAvg, given: dict[str, Reply]) -> State:
    """What Flower's own strategy makes of the same replies, as messages."""
    asked = Message(content=RecordDict(), dst_node_id=1, message_type="train")
    messages = [
        Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({n: t.double() for n, t in reply.state.items()}),
                    "metrics": MetricRecord({"num-examples": reply.examples}),
                    "who": ConfigRecord({"user": user}),
                }
            ),
            reply_to=asked,
        )
        for user, reply in given.items()
    ]
    arrays, _ = rule.aggregate_train(1, messages)
    assert arrays is not None
    return dict(arrays.to_torch_state_dict())


@pytest.mark.usefixtures("flower_identity")
@pytest.mark.parametrize(
    ("robust", "rule"),
    [
        ("mean", FedAvg()),
        ("trimmed", FedTrimmedAvg(beta=0.3)),  # of seven users two at each end
        ("median", FedMedian()),
        ("krum", Krum(num_malicious_nodes=2)),
    ],
)
def test_every_rule_is_flower_s(robust: str, rule: FedAvg) -> None:
    found = mean(replies(), robust=robust, robust_share=0.25)
    for name, tensor in flower(rule, replies()).items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=1e-5, atol=1e-6)
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("robust", ["mean", "trimmed", "median", "krum"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_mean_of_one_or_two_is_one(robust: str, count: int) -> None:
    """Where there are too few to leave anybody out, nobody is."""
    given = replies(USERS[:count])
    found = change(mean(given, robust=robust))
    assert bool(torch.isfinite(found).all()) and found.norm() > 0
    if count == 1:
        torch.testing.assert_close(found, change(dict(given["ann"].state)), rtol=1e-5, atol=1e-6)


WAYS: list[dict[str, Any]] = [
    {},
    {"robust": "trimmed"},
    {"robust": "median"},
    {"robust": "krum"},
    {"average": "products"},
    {"clip": "median"},
    {"clip": 0.2, "robust": "median"},
    {"mode": "dual", "average": "products", "clip": 0.5},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_order_of_users_changes_nothing(way: dict[str, Any]) -> None:
    given = replies()
    forth, back = mean(given, **way), mean(dict(reversed(given.items())), **way)
    assert all(torch.equal(tensor, back[name]) for name, tensor in forth.items())


@pytest.mark.parametrize("way", WAYS[1:4] + [{"clip": "median"}, {"clip": 0.5}], ids=str)
@pytest.mark.parametrize("hostile", ["ann", "cleo"])
def test_a_hostile_user_moves_the_robust_means_less(way: dict[str, Any], hostile: str) -> None:
    """Five times as far the other way is below max_update = 10, and so not refused."""
    honest = change(mean({u: r for u, r in replies().items() if u != hostile}))
    damage = {}
    for name, settings in (("mean", {}), ("robust", way)):
        damage[name] = (change(mean(replies(hostile=hostile, factor=5.0), **settings)) - honest).norm()
    assert damage["robust"] < 0.6 * damage["mean"]


@pytest.mark.parametrize("count", [3, 5, 6])
def test_the_share_that_may_be_hostile_is_rounded_up_but_is_no_majority(count: int) -> None:
    """A share of 0.2 of three users is one of them, or nobody would be left out."""
    users = USERS[:count]
    found = mean(replies(users, hostile="bob", factor=1e3), robust="trimmed", robust_share=0.2)
    assert change(found).norm() < 10 * change(mean(replies(users))).norm()


# ---- clipping


def test_a_change_beyond_the_norm_is_scaled_back_and_told() -> None:
    given = replies()
    sizes = {user: float(change(dict(reply.state)).norm()) for user, reply in given.items()}
    for clip in ("median", statistics.median(sizes.values()), 0.1):
        limit = statistics.median(sizes.values()) if clip == "median" else float(clip)
        found, factors = averaged(start(), given, SharingSettings(clip=clip))
        for user, size in sizes.items():
            assert factors.get(user, 1.0) == pytest.approx(min(1.0, limit / size))
        assert 0 < len(factors) <= len(USERS) and max(factors.values()) < 1
        by_hand = sum(
            EXAMPLES[u] * factors.get(u, 1.0) * change(dict(r.state)) for u, r in given.items()
        ) / sum(EXAMPLES.values())
        torch.testing.assert_close(change(found), by_hand, rtol=1e-4, atol=1e-6)
        assert change(found).norm() <= limit * (1 + 1e-5)
    assert averaged(start(), given, SharingSettings())[1] == {}


# ---- products


@pytest.mark.parametrize(("o", "i", "rank", "users"), [(40, 30, 3, 5), (6, 5, 2, 9), (3, 50, 4, 2)])
def test_the_mean_of_products_is_the_best_of_its_rank(o: int, i: int, rank: int, users: int) -> None:
    """Against the SVD of the dense mean; in the second case the stack is wider than the layer."""
    generator = torch.Generator().manual_seed(users)
    weights = torch.rand(users, generator=generator).div_(users).tolist()
    pairs = [
        LoraPair(torch.randn(rank, i, generator=generator), torch.randn(o, rank, generator=generator))
        for _ in weights
    ]
    dense = sum(w * (p.B.double() @ p.A.double()) for w, p in zip(weights, pairs, strict=True))
    U, sizes, V = torch.linalg.svd(dense)
    best = U[:, :rank] * sizes[:rank] @ V[:rank] if rank <= len(sizes) else dense
    found = refit(pairs, weights, otherwise=pairs[0])
    assert (found.A.shape, found.B.shape) == (pairs[0].A.shape, pairs[0].B.shape)
    torch.testing.assert_close(found.delta().double(), best, rtol=1e-4, atol=1e-5)
    kept = min(rank, len(sizes))
    for row, column, size in zip(found.A[:kept], found.B.T[:kept], sizes, strict=False):
        assert float(row.norm()) == pytest.approx(float(column.norm()), rel=1e-4)  # balanced
        assert float(row.norm()) == pytest.approx(math.sqrt(size), rel=1e-4)


def test_what_a_mean_of_products_does_not_need_can_still_be_trained() -> None:
    """A pair of zeros would never have a gradient again."""
    generator = torch.Generator().manual_seed(0)
    begun = LoraPair(torch.randn(3, 8, generator=generator), torch.zeros(6, 3))
    same = LoraPair(torch.randn(3, 8, generator=generator), torch.zeros(6, 3))
    same.B[:, 0] = torch.arange(1.0, 7.0)  # rank one
    found = refit([same, same], [0.5, 0.5], otherwise=begun)
    torch.testing.assert_close(found.delta(), same.delta(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.A[1:], begun.A[1:]) and not found.B[:, 1:].any()
    nothing = refit([begun, begun], [0.5, 0.5], otherwise=begun)
    assert torch.equal(nothing.A, begun.A) and not nothing.B.any()


def test_products_are_averaged_exactly_where_factors_are_not() -> None:
    """The example of two users whose adapters are the same, with another sign on both factors."""
    one = make(seed=1)
    turned = {name: -tensor for name, tensor in wire.to_state(one).items()}
    given = {"ann": Reply(wire.to_state(one), 10), "bob": Reply(turned, 10)}
    factors = wire.loose_from_state(mean(given))
    products = wire.loose_from_state(mean(given, average="products"))
    for name in SHAPES:
        assert not factors.pairs[name].delta().abs().max() > 1e-6
        torch.testing.assert_close(
            products.pairs[name].delta(), one.pairs[name].delta(), rtol=1e-4, atol=1e-5
        )


# ---- noise

MANY = {f"model.layers.{n}.q_proj": (100, 100) for n in range(6)}


def noisy(begun: State, *, users: int, noise: float, clip: float) -> Tensor:
    """What the server's noise alone adds, to users who all send back what they got."""
    given = {f"user{n}": Reply(begun, 10 + n) for n in range(users)}
    found, _ = averaged(begun, given, SharingSettings(dp_clip=clip, dp_noise=noise))
    return change(found, begun)


@pytest.mark.parametrize(("users", "noise", "clip"), [(1, 1.0, 0.5), (4, 1.0, 0.5), (4, 0.3, 2.0)])
def test_noise_at_the_server_is_as_large_as_is_claimed(users: int, noise: float, clip: float) -> None:
    found = noisy(wire.to_state(make(MANY, rank=8)), users=users, noise=noise, clip=clip)
    wanted = noise * clip / users
    count = len(found)  # 9600: the standard deviation of a sample's is 1 / sqrt(2 count) of it, 0.7 %
    assert float(found.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * count))
    assert abs(float(found.mean())) < 5 * wanted / math.sqrt(count)


def test_one_user_moves_a_noised_mean_by_no_more_than_the_norm_over_how_many_they_are() -> None:
    """Without the noise, to see it: whatever she sends, and however much text she says she has."""
    clip = 0.05
    far = replies()
    far["ann"] = Reply({n: t * 1e4 for n, t in far["ann"].state.items()}, 1_000_000)
    still = replies()
    still["ann"] = Reply(start(), 1)  # who sends back what she got adds nothing to the sum
    moved = (change(mean(far, dp_clip=clip)) - change(mean(still, dp_clip=clip))).norm()
    assert float(moved) <= clip / len(USERS) * (1 + 1e-4)
    assert float(moved) >= clip / len(USERS) * 0.99


@pytest.mark.parametrize("seed", range(3))
def test_noise_at_the_client_is_as_large_as_is_claimed_and_its_change_is_bounded(seed: int) -> None:
    begun, sent = wire.to_state(make(MANY, rank=8)), wire.to_state(make(MANY, rank=8, seed=seed + 1))
    bounded = client.hidden(sent, begun, SharingSettings(dp_at="client", dp_clip=0.5))
    assert float(change(bounded, begun).norm()) == pytest.approx(0.5, rel=1e-4)
    near = {name: tensor + 1e-4 * sent[name] for name, tensor in begun.items()}
    small = client.hidden(near, begun, SharingSettings(dp_at="client", dp_clip=0.5))
    torch.testing.assert_close(change(small, begun), change(near, begun), rtol=1e-3, atol=1e-6)
    settings = SharingSettings(dp_at="client", dp_clip=0.5, dp_noise=0.8)
    noise = change(client.hidden(sent, begun, settings), bounded)
    assert float(noise.std()) == pytest.approx(0.4, rel=5 / math.sqrt(2 * len(noise)))
    assert not torch.equal(noise, change(client.hidden(sent, begun, settings), bounded))  # from no seed
    still = change(client.hidden(begun, begun, settings), begun)  # no change: noise all the same
    assert float(still.std()) == pytest.approx(0.4, rel=5 / math.sqrt(2 * len(still)))
    assert all(np.isfinite(tensor.numpy()).all() for tensor in bounded.values())


def exact_epsilon(noise: float, releases: int, delta: float) -> float:
    """The analytic Gaussian mechanism (Balle and Wang 2018): releases of one noise are one, of less noise."""
    sigma = noise / math.sqrt(releases)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def loss(epsilon: float) -> float:
        return normal(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * normal(
            -0.5 / sigma - epsilon * sigma
        )

    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "releases"), [(4.0, 20), *thorough((1.0, 1), (1.0, 4), (0.7, 3), (30.0, 5))]
)
def test_epsilon_is_an_upper_bound_of_the_exact_one_and_near_it(noise: float, releases: int) -> None:
    found = privacy.epsilon_of(noise, releases, 1e-5)
    exact = exact_epsilon(noise, releases, 1e-5)
    assert found is not None and exact <= found <= 1.02 * exact + 0.01


def test_next_to_no_noise_has_no_epsilon_and_much_has_one_near_nothing() -> None:
    assert privacy.epsilon_of(0.01, 3, 1e-5) is None
    most, more = privacy.epsilon_of(50.0, 1, 1e-5), privacy.epsilon_of(1e6, 1, 1e-5)
    assert most == more and most is not None and 0 < most < 0.1
    assert privacy.epsilon_of(1.0, 0, 1e-5) == 0.0


def test_what_is_told_of_privacy_says_what_it_is_of() -> None:
    at_server = privacy.spent(SharingSettings(dp_clip=1.0, dp_noise=2.0), 3)
    at_client = privacy.spent(SharingSettings(dp_clip=1.0, dp_noise=4.0, dp_at="client"), 3)
    assert at_server is not None and at_client is not None
    assert at_server.epsilon == at_client.epsilon == privacy.epsilon_of(2.0, 3, 1e-5)
    assert "every user's own adapter reaches as it is" in at_server.not_covered
    clipped = privacy.spent(SharingSettings(dp_clip=1.0), 3)
    assert clipped is not None and clipped.epsilon is None  # no noise, no bound
    assert privacy.spent(SharingSettings(), 3) is None


def test_noise_without_its_accountant_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    privacy.require(SharingSettings(dp_clip=1.0, dp_noise=1.0))
    monkeypatch.setattr(privacy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape('pip install "soppu[privacy]"')):
        privacy.require(SharingSettings(dp_clip=1.0, dp_noise=1.0))
    privacy.require(SharingSettings(dp_clip=1.0))
