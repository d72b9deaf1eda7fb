"""The users' change in a mixed batch, against the sum of the bundle's components one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from soppu.compress.bundle.bundle import Bundle
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.numbers.components import Components, Side, unit
from soppu.errors import BundleError
from soppu.serve.layers import kernels, native
from soppu.serve.layers.kernels import Kernel
from soppu.serve.vllm_plugin.worker import resident
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.static import Limits, StaticStep
from soppu.serve.vllm_plugin.worker.step import Step
from soppu.serve.vllm_plugin.worker.worker import adapted
from tests.soppu.serve import handmade
from tests.soppu.serve.vllm_plugin import engine

SHARED = ("shared", "axis", "shared")
USERS = {
    "ann": [SHARED],
    "bob": [("shared",), None, SHARED],  # not the k projection
    "cem": [SHARED],
    "dot": [()],  # an adapter of zeros
}
OWN = {
    "ann": [("own", "own", "own")],
    "bob": [("own",), None, ("left", "right")],
    "cem": [("both", "own")],
    "dot": [()],
}
MIXED = {
    "ann": [SHARED],
    "bob": [("own", "own"), SHARED, ("shared",)],  # a core at one module, a record at others
    "cem": [("both", "left", "right", "axis"), ()],
    "dot": [()],
}
FLEETS: dict[str, dict[str, handmade.Plan]] = {"cores": USERS, "own": OWN, "mixed": MIXED}
How = Kernel | Limits
LAYERS = ("block.qkv_proj", "block.o_proj")


def _native() -> How:
    if why := native.load():
        pytest.skip(f"no compiled kernel: {why}")
    return kernels.native


@pytest.fixture(params=["plain", "native", "static"])
def kernel(request: pytest.FixtureRequest) -> How:
    made: dict[str, Callable[[], How]] = {
        "plain": lambda: kernels.plain,
        "native": _native,
        "static": _static,
    }
    return made[request.param]()


def _static() -> How:
    return Limits(tokens=1400, requests=20, bases=4)


def _bundle(fleet: str = "cores", **changes: object) -> Bundle:
    return handmade.bundle(engine.SHAPES, FLEETS[fleet], **changes)  # type: ignore[arg-type]


@pytest.fixture(params=FLEETS)
def fleet(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _step(bundle: Bundle, kernel: How, **form: object) -> Step | StaticStep:
    linears = adapted(engine.linears(), bundle.shapes, who="bundle")
    chosen = Form(**{"dtype": torch.float32, "device": torch.device("cpu"), "start": 1, "spare": 2} | form)  # type: ignore[arg-type]
    return _made(linears, kernel, resident.build(Shelf.of(bundle), linears, chosen))


def _made(linears: list[resident.Linear], kernel: How, first: resident.Resident) -> Step | StaticStep:
    if isinstance(kernel, Limits):
        return StaticStep(linears, [first], kernel)
    step = Step(linears, kernel)
    step.add(first)
    return step


def _run(step: Step | StaticStep, layer: str, x: Tensor) -> Tensor:
    names = [linear.name for linear in step.linears]
    y = torch.ones(len(x), sum(engine.SHAPES[name][0] for name in engine.PACKED[layer]), dtype=x.dtype)
    if layer in names:
        step.apply(x, y, names.index(layer))
    return y - 1


def _rows(bundle: Bundle, users: Sequence[str | None], start: int = 1) -> np.ndarray:
    return np.array([0 if user is None else start + bundle.index(user) for user in users])


def _close(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert float((got.double() - wanted).abs().max()) < tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("clusters", [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 2, 0]])
@pytest.mark.parametrize("counts", [[1, 1, 1, 1, 1, 1], [3, 11, 1, 7, 0, 2]])
def test_a_mixed_batch_gets_every_users_own_change(
    kernel: How, fleet: str, clusters: list[int], counts: list[int]
) -> None:
    bundle = _bundle(fleet, clusters=clusters)
    step = _step(bundle, kernel)
    users = ["ann", None, "bob", "cem", "dot", "ann"]
    step.begin(_rows(bundle, users), np.array(counts))
    tokens = [user for user, count in zip(users, counts, strict=True) for _ in range(count)]
    for layer in LAYERS:
        x = torch.randn(len(tokens), engine.INPUTS[layer])
        _close(_run(step, layer, x), engine.expected(bundle, tokens, layer, x))


def test_tokens_of_the_base_model_keep_their_very_bits(kernel: How, fleet: str) -> None:
    bundle = _bundle(fleet)
    step = _step(bundle, kernel)
    step.begin(_rows(bundle, ["ann", None, "bob", None]), np.array([1, 1, 1, 2]))
    x, y = torch.randn(5, 20), torch.randn(5, 40)
    after = y.clone()
    step.apply(x, after, [linear.name for linear in step.linears].index("block.qkv_proj"))
    assert torch.equal(after[[1, 3, 4]], y[[1, 3, 4]])
    assert not torch.equal(after[0], y[0])


def test_a_batch_of_the_base_model_alone_does_nothing(kernel: How, fleet: str) -> None:
    bundle = _bundle(fleet)
    step = _step(bundle, kernel)
    step.begin(_rows(bundle, ["ann"]), np.array([4]))
    step.begin(_rows(bundle, [None, None]), np.array([2, 2]))
    assert not _run(step, "block.qkv_proj", torch.randn(4, 20)).any()


def test_a_long_prompt_is_taken_in_chunks(kernel: How, fleet: str) -> None:
    bundle = _bundle(fleet, clusters=[0, 1, 0, 1])
    step = _step(bundle, kernel)
    step.begin(_rows(bundle, ["ann", "bob", "cem"]), np.array([700, 1, 600]))
    tokens = ["ann"] * 700 + ["bob"] + ["cem"] * 600
    x = torch.randn(len(tokens), 20)
    _close(_run(step, "block.qkv_proj", x), engine.expected(bundle, tokens, "block.qkv_proj", x))


@pytest.mark.parametrize(("k_out", "k_in"), [(16, 16), (33, 40), (3, 7)])
def test_ranks_of_every_size(kernel: How, k_out: int, k_in: int) -> None:
    wide = {"block.o_proj": (80, 96)}
    users = {"ann": [("shared",) * 2], "bob": [("shared",) * 40]}  # thin core factors, and full cores
    bundle = handmade.bundle(wide, users, sizes=handmade.Sizes(k_out=k_out, k_in=k_in))
    part = resident.Part("block.o_proj", wide["block.o_proj"], first=0, size=80, at=5)
    linear = resident.Linear("block.o_proj", first=0, size=96, out=90, parts=(part,))
    form = Form(torch.float32, torch.device("cpu"))
    step = _made([linear], kernel, resident.build(Shelf.of(bundle), [linear], form))
    step.begin(np.array([2, 1]), np.array([5, 6]))
    x, y = torch.randn(11, 96), torch.zeros(11, 90)
    step.apply(x, y, 0)
    wanted = [handmade.meaning(bundle, user, "block.o_proj") for user in ["bob"] * 5 + ["ann"] * 6]
    _close(y[:, 5:85], torch.stack([D @ row for D, row in zip(wanted, x.double(), strict=True)]))
    assert not y[:, :5].any() and not y[:, 85:].any()


def test_bfloat16_stays_within_its_own_rounding(kernel: How, fleet: str) -> None:
    bundle = _bundle(fleet)
    step = _step(bundle, kernel, dtype=torch.bfloat16)
    tokens = ["ann", None, "cem", "bob"] * 5
    step.begin(_rows(bundle, tokens), np.ones(20, dtype=np.int64))
    x = torch.randn(20, 20).bfloat16()
    _close(_run(step, "block.qkv_proj", x), engine.expected(bundle, tokens, "block.qkv_proj", x), 0.03)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_tensor_parallel_server_add_up(size: int, fleet: str) -> None:
    bundle = _bundle(fleet, clusters=[0, 1, 0, 0])
    tokens = ["ann", "bob", "cem"]
    x = {"block.qkv_proj": torch.randn(3, 20), "block.o_proj": torch.randn(3, 24)}
    columns, summed = [], torch.zeros(3, 20)
    for rank in range(size):
        linears = adapted(engine.linears(rank=rank, size=size), dict(bundle.shapes), who="bundle")
        step = Step(linears, kernels.plain)
        step.add(resident.build(Shelf.of(bundle), linears, Form(torch.float32, torch.device("cpu"))))
        step.begin(_rows(bundle, tokens), np.ones(3, dtype=np.int64))
        for number, linear in enumerate(linears):
            y = torch.zeros(3, linear.out)
            mine = x[linear.name][:, linear.first : linear.first + linear.size]
            step.apply(mine.contiguous(), y, number)
            if linear.name == "block.qkv_proj":
                columns.append(y.split([part.size for part in linear.parts], dim=1))
            else:
                summed += y
    whole = torch.cat([torch.cat(parts, 1) for parts in zip(*columns, strict=True)], 1)
    _close(whole, engine.expected(bundle, tokens, "block.qkv_proj", x["block.qkv_proj"]))
    _close(summed, engine.expected(bundle, tokens, "block.o_proj", x["block.o_proj"]))


def test_an_adapter_as_own_numbers_is_cut_as_the_layers_are() -> None:
    bundle, g = _bundle("own"), torch.Generator().manual_seed(3)
    rows = {}
    for name, (o, i) in engine.SHAPES.items():
        sides = (Side.of_own(torch.randint(-127, 128, (2, d), generator=g).float(), 8) for d in (o, i))
        rows[name] = Components(torch.zeros(2, dtype=torch.int64), torch.tensor([3.0, -2.0]), *sides)
    x, summed, columns = torch.randn(3, 20), [], torch.zeros(3, 20)
    for rank in range(2):
        linears = adapted(engine.linears(rank=rank, size=2), dict(bundle.shapes), who="bundle")
        made = resident.build(Shelf.of(bundle), linears, _FORM)
        step = Step(linears, kernels.plain)
        step.add(made.with_own(made.spare[1], rows))
        step.begin(np.array([1 + made.spare[1]]), np.array([3]))
        for number, linear in enumerate(linears):
            y = torch.zeros(3, linear.out)
            whole = x if linear.name == "block.qkv_proj" else torch.cat([x, x[:, :4]], 1)
            step.apply(whole[:, linear.first : linear.first + linear.size].contiguous(), y, number)
            if linear.name == "block.qkv_proj":
                summed.append(y.split([part.size for part in linear.parts], dim=1))
            else:
                columns += y
    wanted = {name: _change(part) for name, part in rows.items()}
    got = torch.cat([torch.cat(parts, 1) for parts in zip(*summed, strict=True)], 1)
    _close(got, x.double() @ torch.cat([wanted[name] for name in engine.PACKED["block.qkv_proj"]]).mT)
    _close(columns, torch.cat([x, x[:, :4]], 1).double() @ wanted["block.o_proj"].mT)


_FORM = Form(torch.float32, torch.device("cpu"), spare=2)


def _change(part: Components) -> Tensor:
    left, right = (unit(side.own.double()) for side in (part.left, part.right))
    return (left * part.gain[:, None].double()).mT @ right


def test_modules_nobody_changes_are_left_alone(kernel: How) -> None:
    shapes = dict(list(engine.SHAPES.items())[:3])
    bundle = handmade.bundle(shapes, {"ann": [("own",), None, ()]}, sizes=handmade.Sizes(k_out=0, k_in=0))
    step = _step(bundle, kernel)
    assert [line.name for line in step.linears] == ["block.qkv_proj"]
    assert Shelf.of(bundle).survey.changed == {"block.q_proj"}
    step.begin(_rows(bundle, ["ann"]), np.array([3]))
    x = torch.randn(3, 20)
    changed = _run(step, "block.qkv_proj", x)
    _close(changed, engine.expected(bundle, ["ann"] * 3, "block.qkv_proj", x))
    assert changed[:, :24].any() and not changed[:, 24:].any()


def test_a_module_with_bases_that_nobody_changes_waits_for_adapters(kernel: How) -> None:
    shapes = dict(list(engine.SHAPES.items())[:3])
    bundle = handmade.bundle(shapes, {"ann": [SHARED, None, ()]})
    step = _step(bundle, kernel)
    assert [part.module for part in step.linears[0].parts] == list(shapes)
    step.begin(_rows(bundle, ["ann"]), np.array([3]))
    x = torch.randn(3, 20)
    changed = _run(step, "block.qkv_proj", x)
    _close(changed, engine.expected(bundle, ["ann"] * 3, "block.qkv_proj", x))
    assert changed[:, :24].any() and not changed[:, 24:].any()


def test_two_bundles_at_once(kernel: How, fleet: str) -> None:
    old, new = _bundle(fleet, seed=1), _bundle(fleet, seed=2, clusters=[1, 0, 1, 0])
    step = _step(old, kernel)
    first = 1 + len(old.users) + 2
    ranks = {name: bases[0].k for name, bases in step.at(1).bases.items()}
    form = Form(torch.float32, torch.device("cpu"), start=first, ranks=ranks)
    step.add(resident.build(Shelf.of(new), step.linears, form))
    rows = np.concatenate([_rows(old, ["ann", "cem"]), [0], _rows(new, ["ann", "bob"], first)])
    x = torch.randn(5, 20)
    step.begin(rows, np.ones(5, dtype=np.int64))
    wanted = torch.cat(
        [
            engine.expected(old, ["ann", "cem", None], "block.qkv_proj", x[:3]),
            engine.expected(new, ["ann", "bob"], "block.qkv_proj", x[3:]),
        ]
    )
    _close(_run(step, "block.qkv_proj", x), wanted)
    step.drop(1)
    with pytest.raises(BundleError, match=r"row 1 belongs to none of 1 bundles"):
        step.begin(rows, np.ones(5, dtype=np.int64))


def test_a_module_the_engine_lacks_is_named() -> None:
    bundle = handmade.bundle({"block.w_proj": (4, 4)}, {"ann": [("shared",)]}, sizes=handmade.Sizes(3, 3))
    with pytest.raises(BundleError, match=r"block\.w_proj: the engine has no such linear layer"):
        adapted(engine.linears(), bundle.shapes, who="bundle")
    with pytest.raises(BundleError, match=r"block\.q_proj: shape \(4, 4\), the base model has \(24, 20\)"):
        adapted(engine.linears(), {"block.q_proj": (4, 4)}, who="bundle")


def test_a_recorded_pass_serves_whoever_is_in_the_batch_when_it_is_replayed(fleet: str) -> None:
    """What the pass reads stays where it is: the same addresses before and after a batch of others."""
    bundle = _bundle(fleet, clusters=[0, 1, 0, 1])
    step = _step(bundle, _static())
    assert isinstance(step, StaticStep)
    read = _addresses(step)
    for tokens in (["ann", "bob"], [None, "cem", "ann", "dot", "bob"], ["cem"], [None, None, None]):
        padded = [*tokens, *[None] * (8 - len(tokens))]  # a recorded pass is longer than the batch
        step.begin(_rows(bundle, tokens), np.ones(len(tokens), dtype=np.int64))
        x = torch.randn(8, 20)
        _close(_run(step, "block.qkv_proj", x), engine.expected(bundle, padded, "block.qkv_proj", x))
    assert read == _addresses(step)


def _addresses(step: StaticStep) -> list[int]:
    held = [step._copies, step._copy, step._base, *(layer.V for layer in step._layers)]
    for own in (layer.own for layer in step._layers if layer.own is not None):
        held += [own.q, *own.p, own.right, own.left, own.b, own.a]
    return [tensor.data_ptr() for tensor in held]


def test_a_static_server_says_when_a_bundle_finds_no_place() -> None:
    old, new = _bundle(seed=1, clusters=[0, 1, 0, 1]), _bundle(seed=2, clusters=[0, 1, 2, 0])
    step = _step(old, _static())
    ranks = {name: bases[0].k for name, bases in step.at(1).bases.items()}
    form = Form(torch.float32, torch.device("cpu"), start=10, ranks=ranks)
    with pytest.raises(BundleError, match="3 bases are needed, 2 of 4 are free"):
        step.add(resident.build(Shelf.of(new), step.linears, form))
    wider = _bundle(sizes=handmade.Sizes(k_out=8, k_in=8))
    with pytest.raises(BundleError, match=r"shared ranks 8, 8, this server was started with 6, 5"):
        resident.build(Shelf.of(wider), step.linears, form)
    own = handmade.bundle(engine.SHAPES, {"ann": [("own",) * 9]})
    form = Form(torch.float32, torch.device("cpu"), start=20, ranks=ranks)
    with pytest.raises(BundleError, match=r"9 components with own numbers, .* started with 4; restart it"):
        step.add(resident.build(Shelf.of(own), step.linears, form))
