"""A bundle of cores is served as any other: real requests, texts equal to PEFT's on the exact LoRA."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import CompressOptions, compress_cores
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreAdapter, CoreInBasis
from tests.soppu.serve import tiny

PROMPTS = ("def main():", "the quick")


def a_basis(k_out: int, k_in: int) -> CoreBasis:
    draw = torch.Generator().manual_seed(2)
    sides = {}
    for name, (o, _, i) in tiny.lora(tiny.llama(), seed=0).shapes().items():
        u, v = torch.randn(o, k_out, generator=draw), torch.randn(i, k_in, generator=draw)
        sides[name] = (torch.linalg.qr(u).Q.contiguous(), torch.linalg.qr(v).Q.contiguous())
    return CoreBasis(sides, "tiny", tiny.BASE_HASH)


def a_core(basis: CoreBasis, seed: int, *, own: int = 0) -> CoreAdapter:
    draw = torch.Generator().manual_seed(seed)
    made = {n: 2 * torch.randn(s, generator=draw) for n, s in basis.core_shapes().items()}
    beside = {
        n: LoraPair(0.5 * torch.randn(own, i, generator=draw), 0.5 * torch.randn(o, own, generator=draw))
        for n, (o, i) in (basis.module_shapes().items() if own else ())
    }
    return dataclasses.replace(cores.zero(basis), cores=made, own=beside)


@pytest.mark.parametrize(("k_out", "k_in", "bits"), [(6, 6, 32), (7, 5, 8)])
def test_texts_are_those_of_peft_on_the_exact_lora(tmp_path: Path, k_out: int, k_in: int, bits: int) -> None:
    basis = a_basis(k_out, k_in)
    members = {f"u{n}": a_core(basis, n, own=n) for n in range(3)}
    exact = {user: CoreInBasis(core, basis).to_lora() for user, core in members.items()}
    told: dict[str, CoreAdapter | LoraAdapter] = {**members, "lora": exact["u0"]}
    made = compress_cores(told, basis, CompressOptions(method="joint", basis_bits=bits, core_bits=bits))
    bundle_id = made.save(tmp_path / "bundle")
    # in float32 what is kept is what was trained; with fewer bits it is what the bundle says it is
    stored = exact if bits == 32 else {user: made.reconstruct(user) for user in members}
    wanted = {**stored, "lora": stored["u0"], "": None}
    asked = [(user, prompt) for user in wanted for prompt in PROMPTS]
    with tiny.served(tiny.llama(), tmp_path / "state", bundle=(tmp_path / "bundle", bundle_id)) as url:

        def ask(one: tuple[str, str]) -> str:
            parameters = {"max_new_tokens": 8} | ({"adapter_id": one[0]} if one[0] else {})
            body = {"inputs": one[1], "parameters": parameters}
            answer = httpx.post(f"{url}/generate", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["generated_text"])

        with ThreadPoolExecutor(len(asked)) as pool:  # all in one batch
            answers = dict(zip(asked, pool.map(ask, asked), strict=True))
    for (user, prompt), answer in answers.items():
        assert answer == tiny.peft_text(tiny.llama(), prompt, wanted[user], tokens=8), (user, prompt)
    assert len({answers[user, PROMPTS[0]] for user in ("", *members)}) == 4
