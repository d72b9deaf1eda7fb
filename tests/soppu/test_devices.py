"""Where things are computed: a device by its setting, and every part of a federation on a second device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from soppu import devices, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress.options import CompressOptions
from soppu.config import AlignConfig, Config
from soppu.data import IGNORE, Block
from soppu.devices import torch_device
from soppu.errors import ConfigError
from soppu.federation import attach, emulator, memory
from soppu.federation.align import Aligner
from soppu.federation.attach import initial_pairs
from soppu.federation.client_part import ClientPart
from soppu.federation.emulator import TopModel
from soppu.federation.train import TrainOptions, cache_states, fit, mean_loss
from tests.second_device import Elsewhere, second_device
from tests.thorough import thorough

pytestmark = pytest.mark.no_cover  # other tests cover the same lines; tracing takes a third of the time

GENERATOR = torch.Generator().manual_seed(3)
BLOCKS = [
    Block(ids, torch.where(torch.arange(len(ids)) < 3, IGNORE, ids))
    for ids in (torch.randint(2, 300, (length,), generator=GENERATOR) for length in (9, 6, 12))
]


# ---- the setting


def test_auto_takes_what_is_there() -> None:
    assert torch_device("auto", key="x").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch_device("cpu", key="x") == torch.device("cpu")


@pytest.mark.parametrize("key", ["align.device", "federation.client_device", "gate.device"])
def test_a_device_that_is_absent_is_refused_by_the_key_that_asks_for_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = 'cuda:99', this machine has . CUDA devices$"):
        torch_device("cuda:99", key=key)


def test_a_name_that_is_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gate.device = 'tpux', allowed: auto, cpu, cuda or cuda:N"):
        torch_device("tpux", key="gate.device")
    with pytest.raises(ConfigError, match=r"compress.device = 'cuda:99', this machine has"):
        CompressOptions(device="cuda:99").torch_device()


def test_the_last_of_several_gpus_is_there_and_the_next_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cuda:1", key="x") == torch.device("cuda", 1)
    assert torch_device("cuda", key="x").type == "cuda"
    with pytest.raises(ConfigError, match="has 2 CUDA"):
        torch_device("cuda:2", key="x")


def test_free_memory_is_the_machines_or_what_a_group_leaves_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_CGROUPS", ((str(tmp_path / "none"), "a", "b", "c"),))
    machine = devices.free_bytes(torch.device("cpu"))
    assert machine > 2**20
    monkeypatch.setattr(devices, "_CGROUPS", ((str(tmp_path), "max", "now", "inactive_file"),))
    for name, text in {
        "max": "5000\n",
        "now": "3000\n",
        "memory.stat": "anon 1\ninactive_file 700\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert devices.free_bytes(torch.device("cpu")) == 2700  # files that are read again are no use of memory
    (tmp_path / "max").write_text("max\n")
    assert devices.free_bytes(torch.device("cpu")) > 2**20


# ---- on a second device: a forgotten `.to(device)` fails here, without a GPU


def start_of(shapes: dict[str, tuple[int, int]]) -> LoraAdapter:
    generator = torch.Generator().manual_seed(5)
    return LoraAdapter(
        {
            name: LoraPair(
                torch.randn(3, i, generator=generator) * 0.2, torch.randn(o, 3, generator=generator)
            )
            for name, (o, i) in shapes.items()
        }
    )


def same(ours: LoraAdapter, theirs: LoraAdapter) -> None:
    assert ours.pairs.keys() == theirs.pairs.keys()
    for name, pair in ours.pairs.items():
        for side in ("A", "B"):
            found, wanted = getattr(pair, side), getattr(theirs.pairs[name], side)
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", *thorough("bfloat16")])
@pytest.mark.parametrize("family", ["llama", *thorough("gpt2")])
def test_a_clients_step_runs_on_its_device(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, family: str, dtype: str
) -> None:
    """Reading, states with the emulator's LoRA, training with the proximal term, the losses of a user."""
    make_model(family).save_pretrained(tmp_path / "base")
    base = models.resolve(str(tmp_path / "base"), cache=tmp_path)
    plan = emulator.make_plan(models.skeleton(base), base_hash=base.hash, adapter_layers=2, drop_ratio=0.34)
    lora = emulator.to_own(
        start_of(emulator.target_shapes(models.skeleton(base), plan, plan.kept)), plan, plan.kept
    )
    options = TrainOptions(steps=3, batch_size=2, prox_weight=1e-3)
    compute = models.computing("auto", dtype)

    def step(device: torch.device) -> tuple[LoraAdapter, float, type]:
        part = ClientPart(base, plan, dtype=dtype, compute=compute, device=device)
        start = start_of(part.shapes)
        with part.bottom(lora) as bottom:
            states = cache_states(bottom, BLOCKS, pad_id=1)
        trained = fit(part.top, plan, states, start=start, options=options).adapter
        loss = mean_loss(part.top, plan, states, adapter=trained)
        assert loss < mean_loss(part.top, plan, states, adapter=None) + 5
        return trained, loss, type(states[0].states)

    here, loss, _ = step(torch.device("cpu"))
    with second_device() as device:
        there, other, kind = step(device)
    assert kind is Elsewhere
    if dtype == "float32":
        same(there, here)
    assert other == pytest.approx(loss, rel=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("kl_weight", [0.05, 0.0])
def test_alignment_runs_on_its_device(make_model: Callable[..., PreTrainedModel], kl_weight: float) -> None:
    model = make_model("llama")
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.34)
    user = start_of(emulator.target_shapes(model, plan))
    options = AlignConfig(batch_size=2, rank=4, kl_weight=kl_weight)

    def align(model: PreTrainedModel) -> tuple[LoraAdapter, float]:
        aligner = Aligner(model, plan, options=options, pad_id=1, seed=0)
        aligner.observe(BLOCKS, BLOCKS[:2])
        aligner.load(aligner.state())
        list(aligner.steps(1, user_adapter=user))
        aligner.load(aligner.state())  # with moments
        list(aligner.steps(1, user_adapter=user))
        return aligner.adapter(), aligner.measure().l2

    here, l2 = align(model)
    with second_device() as device:
        there, other = align(make_model("llama").to(device))
    same(there, here)
    assert other == pytest.approx(l2, rel=1e-4)


def test_a_users_losses_are_measured_on_the_device(make_model: Callable[..., PreTrainedModel]) -> None:
    """As evaluation does: the top in float32 over bfloat16 weights, adapters from the CPU."""

    def losses(model: PreTrainedModel) -> list[float]:
        plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.0)
        top, bottom = TopModel(model, plan), emulator.with_layers(model, plan.bottom)
        states = cache_states(bottom, BLOCKS, pad_id=1)
        adapter = start_of(emulator.target_shapes(model, plan))
        return [mean_loss(top, plan, states, adapter=each) for each in (None, adapter)]

    here = losses(make_model("llama").bfloat16())
    with second_device() as device:
        there = losses(make_model("llama").bfloat16().to(device))
    assert there == pytest.approx(here, rel=1e-3)  # another kernel of attention, in bfloat16


def test_an_adapter_that_stayed_behind_would_be_found(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second device is as strict as CUDA: without the move in `attached` nothing above passes."""
    model = make_model("llama")
    plan = emulator.make_plan(model, base_hash="b" * 64, adapter_layers=2, drop_ratio=0.0)
    pairs = initial_pairs(emulator.target_shapes(model, plan), rank=2, seed=0)
    monkeypatch.setattr(LoraPair, "to", lambda pair, *_, **__: pair)
    with second_device() as device:
        model.to(device)
        ids = BLOCKS[0].ids[None].to(device)
        with attach.attached(model, LoraAdapter(pairs)), pytest.raises(RuntimeError, match="one device"):
            model(input_ids=ids, use_cache=False)
        with pytest.raises(RuntimeError, match="one device"):
            model(input_ids=BLOCKS[0].ids[None], use_cache=False)


@pytest.mark.parametrize(
    ("processor", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        (None, torch.float32),  # a torch that cannot tell
    ],
)
def test_auto_is_bfloat16_only_where_there_are_instructions_for_it(
    processor: dict[str, bool] | None, dtype: torch.dtype, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if processor is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    base = models.resolve(str(tiny_base), cache=tiny_base)
    assert next(models.load_model(base, dtype="auto").parameters()).dtype == dtype
    assert models.computing("auto", "auto") == dtype == models.DTYPES[models.dtype_name("auto")]
    assert models.computing("float32", "auto") == torch.float32
    assert models.computing("auto", "nf4") == torch.bfloat16  # who asks for a dtype by name gets that
    assert memory._bytes(replace(Config(), frozen_dtype="auto")) == (dtype.itemsize, dtype.itemsize)


@pytest.mark.parametrize("emulates", [False, True])
def test_a_gpu_says_itself_whether_it_has_bfloat16(emulates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(*, including_emulation: bool) -> bool:
        return including_emulation or not emulates

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.multiplies_bfloat16() is not emulates


@pytest.mark.parametrize(("busy", "idle"), [(0.0, 8), (50.0, 4), (97.0, 1), (100.0, 1)])
def test_threads_are_as_many_as_cores_that_nobody_works_on(
    busy: float, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    assert devices.idle_cores() == idle
