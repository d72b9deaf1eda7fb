from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soppu.compress.linalg import cluster, diagonal
from soppu.compress.linalg.cores import Cores


def cores(left: Tensor, right: Tensor) -> Cores:
    norm = torch.linalg.matrix_norm(left @ right)
    eye = torch.eye(left.shape[1], dtype=torch.float64)
    weight = torch.ones(right.shape[:2], dtype=torch.float64)
    return Cores(eye, eye, (left / norm[:, None, None]).mT, right, weight, norm.double())


def groups(sizes: tuple[int, ...], *, noise: float, seed: int = 0, K: int = 40, r: int = 4) -> Cores:
    """Users of several kinds: each kind started from its own A and moved it a little, B is one's own."""
    generator = torch.Generator().manual_seed(seed)
    rights = []
    for size in sizes:
        start = torch.randn(r, K, generator=generator)
        rights += [start + noise * torch.randn(r, K, generator=generator) for _ in range(size)]
    left = torch.randn(sum(sizes), K, r, generator=generator)
    outputs = torch.randn(K, 3, generator=generator)
    left = left * 0.2 + outputs @ torch.randn(sum(sizes), 3, r, generator=generator)
    return cores(left, torch.stack(rights))


def same(found: Tensor, sizes: tuple[int, ...]) -> bool:
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return all(len(set(found[truth == c].tolist())) == 1 for c in range(len(sizes))) and len(
        set(found.tolist())
    ) == len(sizes)


SETTINGS = {"rank": 5, "max_steps": 8, "tolerance": 1e-5, "seed": 0}


@pytest.mark.parametrize("sizes", [(10, 10), (18, 4), (8, 6, 10)])
def test_users_of_one_initialisation_find_one_another(sizes):
    held = {"q": groups(sizes, noise=0.25)}
    found = cluster.fit(held, clusters=len(sizes), **SETTINGS)
    assert same(found.cluster, sizes)


def test_the_error_never_rises_and_nobody_would_do_better_elsewhere():
    held = {"q": groups((9, 9), noise=0.8), "v": groups((9, 9), noise=0.8, seed=5)}
    found = cluster.fit(held, clusters=3, **SETTINGS)
    assert all(after <= before + 1e-9 for before, after in zip(found.errors, found.errors[1:], strict=False))
    table = sum(cluster._errors(module, found.fits[name]) for name, module in held.items())
    assert bool((table.gather(1, found.cluster[:, None])[:, 0] <= table.amin(1) + 1e-6).all())


def test_more_clusters_leave_no_more_error():
    held = {"q": groups((12, 12), noise=0.5)}
    errors = [cluster.fit(held, clusters=c, **SETTINGS).errors[-1] for c in (1, 2, 4)]
    assert errors[0] > errors[1] >= errors[2] - 1e-6


def test_one_cluster_is_the_joint_fit_and_as_many_as_users_leave_next_to_nothing():
    held = {"q": groups((3, 3), noise=0.5)}
    one = cluster.fit(held, clusters=1, **SETTINGS)
    assert one.cluster.tolist() == [0] * 6 and one.fits["q"][0].objective[-1] == pytest.approx(
        6 - one.errors[-1]
    )
    every = cluster.fit(held, clusters=6, **SETTINGS)
    assert every.errors[-1] < 1e-6 or every.errors[-1] < 0.5 * one.errors[-1]


def test_the_same_seed_gives_the_same_clusters():
    held = {"q": groups((6, 7, 5), noise=1.0)}
    first, second = (cluster.fit(held, clusters=3, **SETTINGS).cluster for _ in range(2))
    assert torch.equal(first, second)


def test_diagonal_cores_find_a_model_that_is_diagonal():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, 4, generator=generator).double())[0] for _ in range(2))
    sigma = torch.randn(9, 4, generator=generator).double()
    found = diagonal.fit(u * sigma[:, None, :], v.mT.expand(9, -1, -1), (u, v), max_steps=50, tolerance=0.0)
    assert found.errors[-1] == pytest.approx(0, abs=1e-8)


def test_diagonal_steps_never_raise_the_error():
    held = groups((8, 8), noise=0.7)
    start = cluster.fit({"q": held}, clusters=1, **SETTINGS).fits["q"][0]
    found = diagonal.fit(held.left.mT, held.right, (start.U, start.V), max_steps=40, tolerance=0.0)
    total = float((held.left.mT.double() @ held.right.double()).square().sum())
    steps = zip(found.errors, found.errors[1:], strict=False)
    assert all(after <= before + 1e-5 * total for before, after in steps)
    assert found.errors[-1] < found.errors[0]
    full = total - start.objective[-1]
    assert found.errors[-1] >= full - 1e-6  # k numbers cannot do what k x k do


def test_a_diagonal_error_is_that_of_the_model():
    held = groups((5,), noise=0.7)
    start = cluster.fit({"q": held}, clusters=1, **SETTINGS).fits["q"][0]
    found = diagonal.fit(held.left.mT, held.right, (start.U, start.V), max_steps=5, tolerance=0.0)
    model = torch.einsum("pk,nk,qk->npq", found.U, found.sigma, found.V)
    dense = held.left.mT.double() @ held.right.double()
    assert float((dense - model).square().sum()) == pytest.approx(found.errors[-1], rel=1e-6)
