"""What serving many users costs at one layer of a 7B model: benchmarks/results/serve_kernels.json.

    OMP_NUM_THREADS=2 python -m benchmarks.serve_kernels
    python -m benchmarks.serve_kernels --device cuda --dtype bfloat16   # adds a GPU's figures to the CPU's

Adding the users' change to the output of a layer with Mistral-7B's shapes, side by side in one run:

    shared     the plugin's own kernel: compiled on the CPU, `StaticStep` in a CUDA graph on a GPU
    own        the same kernel for users without a basis: `rank` components of their own, integers of 4 bits
    gathered   every token's A and B picked from tables, two batched products: BGMV as plain torch has it
    segments   tokens sorted by user, two products a user: SGMV as plain torch has it
    base       the layer itself, x W^T, as a yardstick

A pass goes through several layers with tensors of their own, as a model does, so no cache holds them all.
`shared` and `own` are rows of their own (`--kinds`); the other ways are in each of them.
The floor is the time that memory needs for the bytes a way must touch, at the bandwidth of a large copy in
the same run; where a layer's part stays in the processor's caches, a way may be faster than it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import RESULTS, circumstances, store
from soppu.compress.bundle.shelf import Shelf
from soppu.compress.numbers.components import Components, Side
from soppu.compress.numbers.quantise import quantise
from soppu.serve.bank.from_bundle import Reading
from soppu.serve.layers import kernels
from soppu.serve.layers.kernels import Basis
from soppu.serve.layers.records import Records, pack
from soppu.serve.vllm_plugin.worker.resident import Linear, Part, Resident, Row
from soppu.serve.vllm_plugin.worker.static import Limits, StaticStep

SHAPES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096), "down_proj": (4096, 14336)}  # (o, i)
RANKS = {"shared": (16, 64), "own": (8, 16)}  # by kind of row
NOBODY = Records.empty(0, (), ())
LAYERS = 32  # as Mistral-7B has; fewer where the tables would not fit
Apply = Callable[[Tensor, Tensor, int], object]  # adds to y (t, o) for x (t, i) at a layer


@dataclass(frozen=True)
class Setting:
    """One row of the table: `rank` is k of the shared basis and r of the LoRA adapters alike."""

    shape: tuple[int, int]
    users: int
    batch: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    def layers(self, numbers: int, room: int) -> int:
        """Layers whose `numbers` each fit in `room` bytes."""
        return max(1, min(LAYERS, room // (numbers * self.dtype.itemsize)))

    def tensor(self, *sizes: int) -> Tensor:
        """Random numbers of a layer's scale; in large tensors a million of them again and again."""
        total = math.prod(sizes)
        drawn = torch.randn(min(total, 2**20), dtype=self.dtype, device=self.device).mul_(0.02)
        return drawn.repeat(-(-total // len(drawn)))[:total].view(sizes)

    def rows(self, seed: int) -> Tensor:
        """(batch,) int64 whose user every token is of."""
        drawn = np.random.default_rng(seed).integers(0, self.users, self.batch)
        return torch.from_numpy(drawn).to(self.device)


def bases(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """V (layers, i, k), U (layers, k, o), and the table of cores (users + 1, layers k_in k_out)."""
    (out, size), k = setting.shape, setting.rank
    cores = setting.tensor(setting.users + 1, LAYERS * k * k)
    return setting.tensor(LAYERS, size, k), setting.tensor(LAYERS, k, out), cores


def shared(setting: Setting, held: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> Apply:
    """The plugin's kernel for this device."""
    if setting.device.type == "cuda":
        return static(setting, held, rows)
    V, U, cores = held
    return in_order(setting, laid_out(V, U), kernels.Tokens(cores, rows, None))


def in_order(setting: Setting, made: list[Basis], tokens: kernels.Tokens) -> Apply:
    """The plugin's CPU kernel, tokens as they come."""
    kernel = kernels.choose("auto", device=setting.device, dtype=setting.dtype)
    return lambda x, y, layer: kernel(x, y, made[layer], tokens)


def static(setting: Setting, held: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> Apply:
    """`StaticStep`, prepared for the batch."""
    V, U, cores = held
    return stepped(setting, laid_out(V, U), cores, rows)


@dataclass(frozen=True, eq=False)
class Tables(Resident):
    """A bundle that is no file: its users' rows are those of a table of cores, or of records."""

    cores: Tensor = field(kw_only=True)
    records: Records | None = field(kw_only=True)

    def read(self, place: int) -> Row:
        """A user's row."""
        if self.records is None:
            return Row(0, self.cores[place], NOBODY)
        return Row(0, None, self.records.slice(place, place + 1))


def stepped(
    setting: Setting, made: list[Basis], cores: Tensor, rows: Tensor, records: Records | None = None
) -> Apply:
    """`StaticStep` over layers of these bases; a user is a row of cores, and of records if there are any."""
    out, size = setting.shape
    names = [f"{number:02d}" for number in range(len(made))]
    parts = [Part(name, shape=setting.shape, first=0, size=out, at=0) for name in names]
    linears = [Linear(part.module, first=0, size=size, out=out, parts=(part,)) for part in parts]
    layers = {name: (basis,) for name, basis in zip(names, made, strict=True)}
    most = records.components().max(axis=0) if records else None
    shelf = cast(Shelf, SimpleNamespace(survey=SimpleNamespace(most=most, floats=False)))
    like, spare = cores[0, :, None][:, :0], range(setting.users, setting.users)
    bundle = (1, shelf, layers, tuple(linears), Reading(), like, spare)
    resident = Tables(*bundle, cores=cores, records=records)
    step = StaticStep(linears, [resident], Limits(tokens=setting.batch, requests=setting.batch, bases=1))
    step.begin(rows.cpu().numpy() + 1, np.ones(setting.batch, np.int64))
    return step.apply


def laid_out(V: Tensor, U: Tensor) -> list[Basis]:
    """One basis a layer, as the plugin keeps them."""
    _, k, out = U.shape
    return [
        Basis.of([(u.mT, v)], [(0, out, -1)], like=v[:, :0], offset=number * k * k)
        for number, (v, u) in enumerate(zip(V, U, strict=True))
    ]


def records(setting: Setting, room: int) -> Records:
    """`rank` components of every user at each of some layers; a user's numbers are another's again."""
    out, size = setting.shape
    layers = max(1, min(LAYERS, room // (setting.users * setting.rank * (size + out) // 2)))
    parts, nobody = [], torch.zeros(setting.rank, dtype=torch.int64)
    for _ in range(layers):
        sides = [Side.of_own(quantise(torch.randn(setting.rank, d), 3), 3) for d in setting.shape]
        parts.append(Components(nobody, torch.ones(setting.rank), *sides))
    one = pack(parts, users=1, cuts=[(range(out), range(size))] * layers, ranks=[(0, 0)] * layers)
    starts = torch.arange(setting.users + 1) * len(one.data)
    return Records(one.data.repeat(setting.users), starts, one.shapes, one.ranks)


def own(setting: Setting, held: Records, rows: Tensor) -> Apply:
    """The plugin's kernel for this device, a user's tokens together."""
    out, size = setting.shape
    cores = torch.zeros(1, 0, dtype=setting.dtype, device=setting.device)
    made = [
        Basis.of([(None, None)], [(0, out, layer)], like=cores.new_zeros(size, 0), k=(0, 0))
        for layer in range(len(held.shapes))
    ]
    if setting.device.type == "cuda":
        return stepped(setting, made, cores, rows, held)
    users, places = rows.sort(stable=True)
    return in_order(setting, made, kernels.Tokens(cores, torch.full_like(rows, -1), places, held, users))


def tables(setting: Setting, room: int) -> tuple[Tensor, Tensor]:
    """A (layers, users, r, i) and B (layers, users, r, o) of ordinary LoRA."""
    out, size = setting.shape
    layers = setting.layers(setting.users * setting.rank * (size + out), room)
    head = (layers, setting.users, setting.rank)
    return setting.tensor(*head, size), setting.tensor(*head, out)


def gathered(A: Tensor, B: Tensor, rows: Tensor) -> Apply:
    """Every token's own A and B, copied out of the tables."""

    def apply(x: Tensor, y: Tensor, layer: int) -> None:
        inner = torch.bmm(A[layer].index_select(0, rows), x.unsqueeze(2)).mT
        y.add_(torch.bmm(inner, B[layer].index_select(0, rows)).squeeze(1))

    return apply


def segments(A: Tensor, B: Tensor, rows: Tensor) -> Apply:
    """One pair of products a user, tables in place; tokens are laid in order and back in every layer."""
    order = torch.argsort(rows, stable=True)
    users, counts = torch.unique_consecutive(rows[order], return_counts=True)
    spans = list(zip(users.tolist(), counts.tolist(), strict=True))

    def apply(x: Tensor, y: Tensor, layer: int) -> None:
        sorted_x, parts, begin = x.index_select(0, order), [], 0
        for user, count in spans:
            parts.append((sorted_x[begin : begin + count] @ A[layer, user].mT) @ B[layer, user])
            begin += count
        y.index_add_(0, order, torch.cat(parts))

    return apply


def base(setting: Setting, room: int) -> tuple[Apply, int]:
    """The layer without any user; and how many layers there are."""
    out, size = setting.shape
    W = setting.tensor(setting.layers(size * out, room), out, size)
    return lambda x, y, layer: torch.mm(x, W[layer].mT, out=y), len(W)


class Stopwatch:
    """Seconds a layer takes in a pass through all of them; a GPU's passes are recorded once and replayed."""

    def __init__(self, setting: Setting, apply: Apply, layers: int) -> None:
        out, size = setting.shape
        self._x, self._y = setting.tensor(setting.batch, size), setting.tensor(setting.batch, out)
        self._apply, self._layers, self._device = apply, layers, setting.device
        self._graph = self._recorded() if self._device.type == "cuda" else None
        self.runs: list[float] = []

    def turn(self, seconds: float) -> None:
        """Go through the layers for about `seconds`, at least once; remember the mean for one layer."""
        finish(self._device)
        passes, began = 0, time.perf_counter()
        while passes == 0 or time.perf_counter() - began < seconds:
            if self._graph is None:
                self._pass()
            else:
                self._graph.replay()
            finish(self._device)
            passes += 1
        self.runs.append((time.perf_counter() - began) / passes / self._layers)

    def _pass(self) -> None:
        for layer in range(self._layers):
            self._apply(self._x, self._y, layer)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            self._pass()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._pass()
        return graph


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device, *, repeats: int = 5) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target, runs = torch.ones_like(source), []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        finish(device)
        runs.append(time.perf_counter() - began)
    return 2 * source.numel() / min(runs)


def touched(setting: Setting, rows: Tensor) -> dict[str, int]:
    """Bytes that a way must move for one layer: x read, y read and written, and its own tensors once."""
    (out, size), rank = setting.shape, setting.rank
    distinct = len(rows.unique())
    tokens = setting.batch * (size + 2 * out)
    lora = tokens + distinct * rank * (size + out)
    numbers = {
        "shared": tokens + rank * (size + out) + distinct * rank * rank,
        "own": tokens,  # and the records, whatever the type
        "gathered": lora,
        "segments": lora,
        "base": setting.batch * (size + out) + size * out,
    }
    made = {name: count * setting.dtype.itemsize for name, count in numbers.items()}
    return made | {"own": made["own"] + distinct * rank * (size + out) // 2}


@dataclass(frozen=True)
class How:
    """How rows are measured: bytes for the tables of one way, turns, and the seed of who asks."""

    room: int
    repeats: int
    seed: int


def measure(kind: str, setting: Setting, speed: float, how: How) -> dict[str, Any]:
    """One row: microseconds a layer of every way, medians over turns that alternate, and the floors."""
    rows, room = setting.rows(how.seed), how.room
    A, B = tables(setting, room)
    if kind == "own":
        held = records(setting, room)
        ours = Stopwatch(setting, own(setting, held, rows), len(held.shapes))
    else:
        ours = Stopwatch(setting, shared(setting, bases(setting), rows), LAYERS)
    watches = {
        kind: ours,
        "gathered": Stopwatch(setting, gathered(A, B, rows), len(A)),
        "segments": Stopwatch(setting, segments(A, B, rows), len(A)),
        "base": Stopwatch(setting, *base(setting, room)),
    }
    for _ in range(how.repeats + 1):
        for watch in watches.values():
            watch.turn(0.05)
    # the first turn warms up
    found = {name: 1e6 * statistics.median(watch.runs[1:]) for name, watch in watches.items()}
    counts = touched(setting, rows)
    floor = {name: 1e6 * counts[name] / speed for name in found}
    best = min(found["gathered"], found["segments"])
    return {
        "microseconds": found,
        "floor_microseconds": floor,
        "over_floor": {name: found[name] / floor[name] for name in found},
        f"lora_over_{kind}": best / found[kind],
        f"{kind}_over_base": found[kind] / found["base"],
    }


def settings(kind: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Setting]]:
    """Every row of the table of one kind."""
    for module, shape in SHAPES.items():
        for rank in RANKS[kind]:
            for users in (1, 64, 1000):
                for batch in (1, 16, 64, 256):
                    yield module, Setting(shape, users, batch, rank, dtype, device)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--room", default=2.0, show_default=True, help="Gigabytes for the tables of one way.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--kinds", default="shared,own", show_default=True)
@click.option("--only", default="", help="The module of the rows to measure; all by default.")
@click.option("--result", default="serve_kernels", show_default=True, help="Name of the result file.")
def main(
    *, device: str, dtype: str, room: float, repeats: int, seed: int, kinds: str, only: str, result: str
) -> None:
    """Measure and write the result file; what it holds of the other device, kinds and modules stays."""
    torch.manual_seed(seed)
    where = torch.device(device)
    speed = bandwidth(where)
    path = RESULTS / f"{result}.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    rows = [
        row
        for row in held.get(device, {}).get("rows", [])
        if row.get("kind", "shared") not in kinds or only not in ("", row["module"])
    ]
    wanted = [
        (kind, *one) for kind in kinds.split(",") for one in settings(kind, where, getattr(torch, dtype))
    ]
    for kind, module, setting in tqdm([one for one in wanted if only in ("", one[1])], unit="row"):
        told = {"kind": kind, "module": module, "users": setting.users}
        told |= {"batch": setting.batch, "rank": setting.rank}
        rows.append(told | measure(kind, setting, speed, How(int(room * 1e9), repeats, seed)))
    made = circumstances(seed=seed, packages=("torch",)) | {
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "bytes_per_second": speed,
        "repeats": repeats,
        "rows": rows,
    }
    if device == "cuda":
        made["gpu"] = torch.cuda.get_device_name()
    print(f"written: {store(result, held | {device: made})}")


if __name__ == "__main__":
    main()
