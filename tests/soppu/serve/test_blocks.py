"""Keys and values in blocks: the kernel that reads them, the memory they take, and who waits for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from soppu.errors import ConfigError
from soppu.serve import compiled
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.compiled import NotCompiled
from soppu.serve.decoders import attention
from soppu.serve.decoders.blocks import BLOCK, Blocks
from soppu.serve.decoders.kv_cache import KVCache, Sizes, Step
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.engine.sampling import Sampling
from tests.soppu.serve import tiny

LIMIT = 80


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def step_of(starts: list[int], counts: list[int], rows: list[int]) -> Step:
    return Step(torch.zeros(len(rows), max(counts), dtype=torch.long), rows, starts, counts)


def filled(rows: list[int], starts: list[int], *, heads: int, d: int, dtype: torch.dtype) -> KVCache:
    """A cache whose rows hold `starts` random tokens, written by plain torch, in blocks in any order."""
    cache = KVCache(max(rows) + 1, LIMIT)
    cache.prepare(Sizes(2, heads, d, item=dtype.itemsize))
    order = random.Random(0).sample(rows, len(rows))
    for row in order:
        start = starts[rows.index(row)]
        for layer in (0, 1):
            step = step_of([0], [start], [row])
            cache.begin(step)
            cache.write(layer, step, torch.randn(1, start, 2, heads, d).to(dtype))
    return cache


def attended(cache: KVCache, layer: int, step: Step, q: Tensor, kv: Tensor) -> Tensor:
    """By plain torch, row by row."""
    cache.begin(step)
    b, T = step.ids.shape
    cache.write(layer, step, kv)
    keys, values = cache.read(layer, step, like=kv[:, :, 0])
    mask = step.mask(torch.float32)[:, None]
    q = q.view(b, T, q.shape[1], -1).transpose(1, 2)
    found = F.scaled_dot_product_attention(
        q.float(), keys.float(), values.float(), attn_mask=mask, enable_gqa=True
    )
    return found.transpose(1, 2).reshape(b * T, -1)


needs_compiler = pytest.mark.skipif(
    not attention.runs(torch.float32, torch.device("cpu"), 8), reason="no C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "d"),
    [(4, 2, 8), (9, 3, 64), (4, 4, 24), (7, 1, 80), (8, 2, 128), (5, 1, 96), (6, 1, 32)],
)
def test_the_kernel_attends_as_torch_does(q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, starts, counts = [0, 2, 3], [1, 33, 47], [7, 1, 17]
    step = step_of(starts, counts, rows)
    m = len(rows) * max(counts)
    q, kv = torch.randn(m, q_heads, d).to(dtype), torch.randn(len(rows), 17, 2, kv_heads, d).to(dtype)
    pairs = []
    for way in ("torch", "kernel"):
        torch.manual_seed(1)
        cache = filled(rows, starts, heads=kv_heads, d=d, dtype=dtype)
        cache.begin(step)
        if way == "torch":
            found = attended(cache, 1, step, q, kv)
        else:
            k, v = (side.reshape(m, kv_heads, d) for side in kv.unbind(2))
            found = attention.Attending(step, cache)(1, q, k, v)
        pairs.append((found.view(len(rows), 17, -1), cache.store(k if way == "kernel" else kv)))
    (expected, wrote), (found, written) = pairs
    assert torch.equal(wrote[2:], written[2:])  # the blocks of rows; padding is nobody's
    for row, count in enumerate(counts):
        torch.testing.assert_close(
            found[row, :count].float(),
            expected[row, :count].float(),
            rtol=0,
            atol=1e-2 if dtype == torch.bfloat16 else 2e-6,
        )


@needs_compiler
def test_a_token_sees_the_same_bits_in_any_company_and_in_any_part() -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(48, 6, 16), torch.randn(1, 48, 2, 2, 16)
    k, v = kv[0].unbind(1)
    together = filled([0, 1, 2], [0, 30, 9], heads=2, d=16, dtype=torch.float32)
    step = step_of([0, 30, 9], [48, 5, 1], [0, 1, 2])
    together.begin(step)
    everyone = attention.Attending(step, together)
    others = torch.randn(2, 48, 6, 16)
    found = everyone(0, torch.cat((q, others.flatten(0, 1))), *(torch.cat((x, x, x)) for x in (k, v)))[:48]
    alone = KVCache(1, LIMIT)
    alone.prepare(Sizes(2, 2, 16, item=4))
    parts = []
    for start, end in ((0, 16), (16, 17), (17, 48)):
        step = step_of([start], [end - start], [0])
        alone.begin(step)
        parts.append(attention.Attending(step, alone)(0, q[start:end], k[start:end], v[start:end]))
    assert torch.equal(found, torch.cat(parts))


@needs_compiler
def test_a_number_that_is_not_finite_stays_with_its_row() -> None:
    cache = filled([0, 1], [20, 20], heads=1, d=16, dtype=torch.float32)
    step = step_of([20, 20], [1, 1], [0, 1])
    cache.begin(step)
    q, k, v = (torch.randn(2, 1, 16) for _ in range(3))
    k[0, 0, 3] = float("nan")
    found = attention.Attending(step, cache)(1, q, k, v)
    assert found[0].isnan().all() and found[1].isfinite().all()
    step = step_of([21, 21], [1, 1], [0, 1])
    cache.begin(step)
    found = attention.Attending(step, cache)(1, q, k.nan_to_num(), v)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_memory_is_taken_by_what_is_written_and_given_back() -> None:
    blocks, process = Blocks(1 << 14), psutil.Process()
    before = process.memory_info().rss
    store = blocks.store(2, 32, like=torch.zeros(0))
    taken = blocks.take(4096)
    size = blocks.block_bytes
    assert size == 2 * 2 * BLOCK * 32 * 4 and process.memory_info().rss - before < 256 * size
    store[taken] = 1.0
    assert 4000 * size < process.memory_info().rss - before < 4500 * size
    blocks.give_back(taken[:4000])
    assert process.memory_info().rss - before < 500 * size
    assert sorted(blocks.take(5000))[:4000] == sorted(taken[:4000]) and blocks.free == (1 << 14) - 5096
    assert not store[taken[:4000]].any() and bool((store[taken[4000:]] == 1).all())


def test_blocks_that_are_no_whole_pages_are_cleaned_by_hand() -> None:
    blocks = Blocks(4)
    store = blocks.store(1, 8, like=torch.zeros(0))
    taken = blocks.take(4)
    store[taken] = float("nan")
    blocks.give_back(taken[1:3])
    assert blocks.free == 2 and store[taken].isnan().flatten(1).all(1).tolist() == [True, False, False, True]


def engine(**options: int) -> Engine:
    model = tiny.llama()
    bank = AdapterBank(model, base_hash=tiny.BASE_HASH)
    bank.add("alice", tiny.lora(model, seed=1))
    return Engine(model, tiny.tokenizer(), bank, EngineOptions(**options))


def test_requests_wait_for_room_and_are_answered_in_their_turn() -> None:
    """Room for one whole row: of five requests that could become long, one runs at a time."""
    texts = [f"the quick brown {n}" for n in range(5)]
    expected = [tiny.peft_text(tiny.llama(), text, None, tokens=6) for text in texts]
    with engine(max_batch_total_tokens=128, prefix_tokens=32) as narrow:
        running, ended = [], []
        for text in texts:
            running.append(narrow.submit(GenerationRequest(text, stop=("\0",), ignore_eos=False)))
        for one in running:
            one.cancel()
        running = [
            narrow.submit(GenerationRequest(text, max_new_tokens=6), sink=ended.append) for text in texts
        ]
        while sum(getattr(event, "finish", None) is not None for event in ended) < 5:
            pages = narrow.cache.pages
            assert pages.used + pages.promised <= pages.blocks.count == 128 // BLOCK * 2
    told = [event.finish.text for event in ended if getattr(event, "finish", None)]
    assert sorted(told) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_batch_total_tokens": 127}, "max_batch_total_tokens: 127, allowed: 128 and more"),
        (
            {"max_batch_total_tokens": 1 << 50},
            r"max_batch_total_tokens: \d+ tokens of 256 bytes cannot",
        ),
        ({"max_batch_total_tokens": -1}, "max_batch_total_tokens: -1, allowed: 0 and more"),
        ({"prefix_tokens": -1}, "prefix_tokens: -1, allowed: 0 and more"),
    ],
)
def test_a_bound_that_cannot_be_is_refused_at_the_start(options: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        engine(**options)


@pytest.mark.parametrize("who", ["", "alice"])
def test_texts_that_are_drawn_are_the_same_where_their_prompt_is_shared(who: str) -> None:
    prompt = "the quick brown fox jumps over the lazy dog: return self.value"
    asked = [
        GenerationRequest(prompt, who, max_new_tokens=8, best_of=2, sampling=Sampling(do_sample=True, seed=n))
        for n in range(3)
    ]
    told = []
    for prefix in (0, 512):
        with engine(prefix_tokens=prefix) as one:
            told.append([one.submit(request).result()[1].text for request in asked])
            found = sum(one.cache.reused.values())
            assert bool(found) == bool(prefix) and one.cache.pages.idle <= 2 * 512 // BLOCK
    assert told[0] == told[1] and len(set(told[0])) == 3


def test_without_a_compiler_attention_is_torchs_and_texts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["the quick brown fox jumps over the lazy dog", "the quick brown fox jumps over it", "def"]
    told = []
    for compiler in (True, False):
        if not compiler:
            monkeypatch.setattr(attention, "_library", lambda: None)
        with engine() as one:
            running = [
                one.submit(GenerationRequest(p, who, max_new_tokens=9))
                for p in prompts
                for who in ("", "alice")
            ]
            told.append([generation.result()[1].text for generation in running])
    assert told[0] == told[1] and len(set(told[0])) == 6


def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "wrong.cpp"
    source.write_text("int main( {")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if attention.runs(torch.float32, torch.device("cpu"), 8):
        with pytest.raises(NotCompiled, match=r"failed: [^$]*error"):
            compiled.library(source)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotCompiled, match="'no-such-compiler' is not on the PATH"):
        compiled.library(source)
    assert not list((tmp_path / "cache").rglob("*.so"))
