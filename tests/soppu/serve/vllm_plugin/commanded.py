"""A control and the worker it commands, no engine between them; and bundles and adapters for the two."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.bundle.bundle import Bundle
from soppu.serve.layers import kernels
from soppu.serve.layers.kernels import Kernel
from soppu.serve.vllm_plugin import state
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.static import Limits
from soppu.serve.vllm_plugin.worker.worker import Worker
from tests.soppu.serve import handmade, tiny
from tests.soppu.serve.vllm_plugin import engine

SHARED = ("shared", "shared", "shared")
MIXED: dict[str, handmade.Plan] = {
    "ann": [SHARED],
    "bob": [("own", "own")],
    "cem": [("both", "left"), ("right",), None, SHARED],
}


@dataclass
class Server:
    """A control and the worker it commands; `busy` is what requests are on."""

    control: Control
    worker: Worker
    busy: set[int] = field(default_factory=set)

    def change(self, name: str, layer: str = "block.qkv_proj") -> Tensor:
        """What a name adds to a layer's weight now, (o, i)."""
        found = self.control.bank.resolve(name)
        assert found is not None
        return self.of_row(found.row, layer)

    def of_row(self, row: int, layer: str = "block.qkv_proj") -> Tensor:
        inputs = engine.INPUTS[layer]
        self.worker.step.begin(np.array([row]), np.array([inputs]))
        y = torch.zeros(inputs, sum(engine.SHAPES[name][0] for name in engine.PACKED[layer]))
        numbers = [linear.name for linear in self.worker.step.linears]
        self.worker.step.apply(torch.eye(inputs), y, numbers.index(layer))
        return y.mT.double()


def _serve(
    folder: Path, bundle: Bundle, *, how: Kernel | Limits = kernels.plain, **changes: Any
) -> Iterator[Server]:
    path = folder / "first.soppu"
    bundle_id = bundle.save(path)
    settings = Settings(**({"bundle": path, "state": folder / "state", "spare_rows": 2} | changes))
    server = begin(settings, how)
    assert server.control.bank.active == bundle_id
    yield server
    server.control.close()


def begin(settings: Settings, how: Kernel | Limits = kernels.plain) -> Server:
    """A server as it starts: the worker reads what the API server left in the state."""
    form = Form(torch.float32, torch.device("cpu"), spare=settings.spare_rows)
    control = Control(settings, base_hash=tiny.BASE_HASH)
    worker = Worker(engine.linears(), how, form, bundles=state.kept_bundles(control.state.folder))
    server = Server(control, worker)
    server.control.connect(Engine(lambda name, *args: [getattr(worker, name)(*args)], lambda: server.busy))
    return server


def _second(folder: Path, users: tuple[str, ...] = ("ann", "cem")) -> tuple[Bundle, Path, str]:
    bundle = handmade.bundle(engine.SHAPES, {user: [SHARED] for user in users}, seed=7)
    path = folder / "second.soppu"
    return bundle, path, bundle.save(path)


def _same(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _adapter(bundle: Bundle, user: str, *, noise: float = 0.0, seed: int = 0) -> LoraAdapter:
    """A pair that changes what the bundle's user changes; `noise` of it lies outside the bases."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, pair in bundle.reconstruct(user).pairs.items():
        off = torch.randn(pair.B.shape, generator=g)
        B = pair.B + off * (noise * pair.B.norm() / off.norm())
        pairs[name] = LoraPair(A=2 * pair.A, B=0.5 * B)
    return LoraAdapter(pairs, base_model="tiny", base_hash=tiny.BASE_HASH)
