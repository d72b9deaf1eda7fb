"""A bundle of cores in the plugin's workers: every user's change is that of the exact pairs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from soppu.adapter import LoraPair
from soppu.compress import Bundle, CompressOptions, compress_cores
from soppu.compress.bundle.shelf import Shelf
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from soppu.serve.layers import kernels, native
from soppu.serve.layers.kernels import Kernel
from soppu.serve.vllm_plugin.worker import resident
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.step import Step
from soppu.serve.vllm_plugin.worker.worker import adapted
from tests.soppu.serve.vllm_plugin import engine


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_core(basis: CoreBasis, seed: int, *, own: int) -> CoreAdapter:
    made = {n: drawn(*s, seed=seed + m) for m, (n, s) in enumerate(basis.core_shapes().items())}
    shapes = basis.module_shapes().items() if own else ()
    beside = {n: LoraPair(drawn(own, i, seed=seed), drawn(o, own, seed=seed + 1)) for n, (o, i) in shapes}
    return dataclasses.replace(cores.zero(basis), cores=made, own=beside)


@pytest.fixture(params=["plain", "native"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "native" and (why := native.load()):
        pytest.skip(f"no compiled kernel: {why}")
    return getattr(kernels, request.param)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("k_out", "k_in", "wide", "bits", "most"),
    [(4, 6, 0, 32, 1e-5), (6, 4, 0, 32, 1e-5), (5, 5, 0, 8, 0.03), (2, 2, 5, 32, 1e-5)],
)
def test_a_mixed_batch_of_cores_gets_what_the_exact_pairs_add(
    kernel: Kernel, k_out: int, k_in: int, wide: int, bits: int, most: float
) -> None:
    sides = {}
    for number, (name, (o, i)) in enumerate(engine.SHAPES.items()):
        more = wide * (number % 2)  # every second module is wider, in layers of several parts too
        u, v = drawn(o, k_out + more, seed=1), drawn(i, k_in + more, seed=2)
        sides[name] = (u / u.norm(dim=0), v / v.norm(dim=0))
    basis = CoreBasis(sides, "tiny", "b" * 64)
    members = {user: a_core(basis, 10 * own, own=own) for own, user in enumerate(("ann", "bob", "cem"))}
    options = CompressOptions(method="joint", basis_bits=bits, core_bits=bits)
    bundle = Bundle.from_bytes(compress_cores(members, basis, options).to_bytes())
    linears = adapted(engine.linears(), bundle.shapes, who="bundle")
    step = Step(linears, kernel)
    form = Form(dtype=torch.float32, device=torch.device("cpu"), start=1, spare=2)
    step.add(resident.build(Shelf.of(bundle), linears, form))
    tokens = ["cem", None, "ann", "bob", "ann"]
    step.begin(
        np.array([0 if one is None else 1 + bundle.index(one) for one in tokens]), np.ones(5, np.int64)
    )
    exact = {user: CoreInBasis(core, basis).to_lora().pairs for user, core in members.items()}
    for number, linear in enumerate(step.linears):
        x, y = drawn(5, engine.INPUTS[linear.name], seed=7), torch.zeros(5, linear.out)
        step.apply(x, y, number)
        wanted = torch.zeros(5, linear.out)
        for row, user in enumerate(tokens):
            if user:
                parts = [exact[user][name].delta() @ x[row] for name in engine.PACKED[linear.name]]
                wanted[row] = torch.cat(parts)
        assert float((y - wanted).abs().max()) < most * float(wanted.abs().max())
        assert not y[1].any()
