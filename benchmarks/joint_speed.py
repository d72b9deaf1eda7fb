"""How long one shared basis takes, three ways, at one module: benchmarks/results/joint_speed.json.

    OMP_NUM_THREADS=2 python -m benchmarks.joint_speed

Side by side in one run on the same fleet (4096 x 4096, rank 16, 1000 users, k = 16 by default):

    dense      the earlier public SOPPU code: every D = B A formed, D V V^T D^T U from left to right in numpy,
               float64 because of the start from `randn`; seconds for one adapter and iteration, from a few
    factored   the same iteration on the factors: nothing of size o x i, four products an iteration
    ours       the fit that `compress --method joint` makes, from surveyed adapters in memory: batches put
               together and decomposed, a basis grown in a sample and in all, alternations, the certificate
    compress   `compress(method="joint")` from the same adapters to the bundle: survey, fit, coding, pages

and, on a fleet small enough for it, what the fit loses against the exact method of `dense_joint.fit`.

Wall-clock seconds are medians over `--repeats`; processor seconds stand beside them, since other processes on
the machine stretch the former only.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import fleets
from benchmarks.record import circumstances, store
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import CompressOptions, compress
from soppu.compress.fleet.passes import Passes
from soppu.compress.fleet.survey import Fleet, survey
from soppu.compress.linalg import bounds, range_finder
from soppu.compress.linalg.canonical import canonical
from soppu.compress.linalg.certificate import Certificate
from soppu.compress.linalg.sketch import weights
from soppu.compress.linalg.tucker import CoreFit
from soppu.compress.methods import shared_basis
from tests.soppu.compress import dense_joint, large_fit

MODULE = "model.layers.0.self_attn.q_proj"
REFERENCE_ITERATIONS = 100  # what the earlier code always made
CHECK = {"n": 300, "side": 1024, "r": 8, "k": 16}


def load(n: int, side: int, r: int, seed: int, **what: float) -> tuple[Tensor, Tensor]:
    """One module of a synthetic fleet in memory: B (n, o, r) and A (n, r, i) float32."""
    spec = fleets.FleetSpec(n=n, r=r, shapes={MODULE: (side, side)}, seed=seed, **what)  # type: ignore[arg-type]
    outs, ins = torch.empty(n, side, r), torch.empty(n, r, side)
    for index in range(n):
        pair = fleets.user(spec, index).pairs[MODULE]
        outs[index], ins[index] = pair.B, pair.A
    return outs, ins


def timed(work: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Medians over `repeats` runs, and every run."""
    wall, processor = [], []
    for _ in range(repeats):
        began, spent = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - spent)
    return {
        "seconds": statistics.median(wall),
        "processor_seconds": statistics.median(processor),
        "runs": wall,
        "load": os.getloadavg()[0],
    }


def dense_step(B: NDArray[Any], A: NDArray[Any], U: NDArray[Any], V: NDArray[Any]) -> tuple[Any, Any]:
    """What one adapter adds to the next U and V; 8 o i r + 8 o i k + 2 (r + k) (o^2 + i^2) flops."""
    return B @ A @ V @ V.T @ A.T @ B.T @ U, A.T @ B.T @ U @ U.T @ B @ A @ V


def dense(outs: Tensor, ins: Tensor, k: int, *, adapters: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds of the earlier code for one adapter and iteration; QR once an iteration is left out."""
    random = np.random.default_rng(seed)
    U = np.linalg.qr(random.standard_normal((outs.shape[1], k)))[0]
    V = np.linalg.qr(random.standard_normal((ins.shape[2], k)))[0]
    pairs = [(outs[n].numpy(), ins[n].numpy()) for n in range(adapters)]
    told = timed(lambda: [dense_step(B, A, U, V) for B, A in pairs], repeats)
    return told | {name: told[name] / adapters for name in ("seconds", "processor_seconds")}


def factored(outs: Tensor, ins: Tensor, k: int, *, iterations: int, seed: int) -> dict[str, Any]:
    """The same iteration on the factors of unit-norm deltas in float32; V follows the new U."""
    made = canonical(outs, ins)
    n, _, q = made.X.shape
    left, right = made.X.mT.reshape(n * q, -1), made.Y.mT.reshape(n * q, -1)
    squared = weights(made.s).float()[:, :, None]
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(right.shape[1], k, generator=generator)).Q
    U = torch.linalg.qr(torch.randn(left.shape[1], k, generator=generator)).Q
    h, g = (left @ U).view(n, q, k), (right @ V).view(n, q, k)
    objective, runs, spent = [], [], time.process_time()
    for _ in range(iterations):
        began = time.perf_counter()
        core = (squared * h).mT @ g
        U = torch.linalg.qr(left.mT @ (squared * (g @ core.mT)).view(n * q, k)).Q
        h = (left @ U).view(n, q, k)
        core = (squared * h).mT @ g
        V = torch.linalg.qr(right.mT @ (squared * (h @ core)).view(n * q, k)).Q
        g = (right @ V).view(n, q, k)
        runs.append(time.perf_counter() - began)
        objective.append(float(((squared * h).mT @ g).double().square().sum()))
    return {
        "seconds": statistics.median(runs),
        "processor_seconds": (time.process_time() - spent) / iterations,
        "objective": objective,
        "load": os.getloadavg()[0],
    }


def ours(fleet: Fleet, k: int, *, repeats: int, seed: int) -> dict[str, Any]:
    """The whole fit, and what its parts take."""
    options = CompressOptions(method="joint", rank=k, seed=seed, device="cpu")
    made: list[
        tuple[range_finder.Grown, CoreFit, Certificate]
    ] = []  # without the deltas: they would fill memory
    clocks: list[Clock] = []

    def fit() -> None:
        clocks.append(Clock())
        ranges = shared_basis.grow_ranges(Passes(fleet, {}), options, progress=clocks[-1])
        grouped = shared_basis.joint(ranges, k)
        certificate = shared_basis.certificates(ranges, grouped)[MODULE]
        made.append((ranges.grown[MODULE], grouped.fits[MODULE][0], certificate))

    whole = timed(fit, repeats)
    grown, found, certificate = made[-1]
    steps = 5
    alternation = timed(lambda: grown.cores.fit(k, max_steps=steps, least=-1.0, start=found), repeats)
    return whole | {
        "passes_seconds": clocks[-1].seconds(),
        "alternation_seconds": alternation["seconds"] / steps,
        "objective": [*grown.found.objective, *found.objective[1:]],
        "passes": grown.passes,
        "width": [grown.cores.left.shape[2], grown.cores.right.shape[2]],
        "total": certificate.total,
        "achieved": certificate.achieved,
        "lower_bound": certificate.lower_bound,
        "confidence": certificate.confidence,
    }


class Clock:
    """Listens to the progress of passes."""

    def __init__(self) -> None:
        self._began, self._ends = time.perf_counter(), dict[str, float]()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Remember when this was last told of."""
        self._ends[what] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """What every pass took, with what was computed before it."""
        ends = list(self._ends.values())
        return {
            what: end - start
            for (what, end), start in zip(self._ends.items(), [self._began, *ends], strict=False)
        }


class InMemory(Mapping[str, LoraAdapter]):
    """A fleet of one module, held as two tensors."""

    def __init__(self, outs: Tensor, ins: Tensor) -> None:
        self._sides = {fleets.name(n): (outs[n], ins[n]) for n in range(len(outs))}
        self.ids = {user: f"a-{user}" for user in self._sides}

    def __getitem__(self, who: str) -> LoraAdapter:
        B, A = self._sides[who]
        return LoraAdapter({MODULE: LoraPair(A=A, B=B)}, base_model="none", base_hash="0" * 64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sides)

    def __len__(self) -> int:
        return len(self._sides)


def whole(held: InMemory, k: int, *, repeats: int) -> dict[str, Any]:
    """A bundle from adapters in memory; their ids are given, since hashing them is the registry's work."""
    options = CompressOptions(method="joint", rank=k, device="cpu")
    return timed(lambda: compress(held, options, adapter_ids=held.ids), repeats)


def check(seed: int) -> list[dict[str, Any]]:
    """Against the exact method and its exact bound; half of the users, none, all began with one A."""
    rows = []
    for p_seed in (0.45, 0.0, 1.0):
        outs, ins = load(CHECK["n"], CHECK["side"], CHECK["r"], seed, p_seed=p_seed)
        # the probabilistic bound is what is checked
        effort = bounds.Effort(probes=16, powers=2, exact_side=0)
        k, settings = CHECK["k"], large_fit.Search(every=2, bound=effort, seed=seed)
        began = time.perf_counter()
        truth = dense_joint.fit(list(outs), list(ins), rank=k, max_steps=50, tolerance=1e-7)
        middle = time.perf_counter()
        fit = large_fit.fit_large(outs, ins, rank=k, search=settings)
        rows.append(
            {
                "p_seed": p_seed,
                "objective": fit.objective[-1],
                "objective_exact": truth.objective[-1],
                "relative_gap": 1 - fit.objective[-1] / truth.objective[-1],
                "gap_of_total": (truth.objective[-1] - fit.objective[-1]) / truth.total,
                "lower_bound": fit.lower_bound,
                "lower_bound_exact": truth.lower_bound,
                "achieved": fit.achieved,
                "total": truth.total,
                "seconds": time.perf_counter() - middle,
                "seconds_exact": middle - began,
            }
        )
    return rows


@click.command()
@click.option("--users", default=1000, show_default=True)
@click.option("--side", default=4096, show_default=True)
@click.option("--lora-rank", default=16, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(users: int, side: int, lora_rank: int, rank: int, repeats: int, seed: int) -> None:
    """Measure and write the result file."""
    outs, ins = load(users, side, lora_rank, seed)
    one = dense(outs, ins, rank, adapters=2, repeats=repeats, seed=seed)
    many = factored(outs, ins, rank, iterations=10, seed=seed)
    held = InMemory(outs, ins)
    fleet = survey(held, adapter_ids=held.ids, device=torch.device("cpu"))
    fitted = ours(fleet, rank, repeats=repeats, seed=seed)
    bundle = whole(held, rank, repeats=repeats)
    everybody = users * one["seconds"]
    made = circumstances(seed=seed, packages=("torch", "numpy")) | {
        "what": "one shared basis at one module: the earlier public code, the factored iteration, ours",
        "setting": {"n": users, "o": side, "i": side, "r": lora_rank, "k": rank, "repeats": repeats},
        "threads": torch.get_num_threads(),
        "dense": one,
        "factored": many,
        "ours": fitted,
        "compress": bundle,
        "check": {"setting": CHECK, "rows": check(seed)},
        "ratios": {
            "dense_over_factored_an_iteration": everybody / many["seconds"],
            "dense_over_an_alternation_of_ours": everybody / fitted["alternation_seconds"],
            "dense_100_iterations_over_ours": REFERENCE_ITERATIONS * everybody / fitted["seconds"],
            "dense_100_iterations_over_ours_processor": REFERENCE_ITERATIONS
            * users
            * one["processor_seconds"]
            / fitted["processor_seconds"],
            "objective_over_factored_10_iterations": fitted["objective"][-1] / many["objective"][-1],
        },
    }
    path = store("joint_speed", made)
    print(f"{fitted['seconds']:.2f} s ({fitted['processor_seconds']:.2f} s of processors); written: {path}")


if __name__ == "__main__":
    main()
