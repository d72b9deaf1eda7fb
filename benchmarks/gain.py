"""How much of what users gained survives compression, by method and ratio: benchmarks/results/gain.json.

    python -m benchmarks.gain [--run RUN_DIR]

Without RUN_DIR the adapters of benchmarks/personal.toml are trained first (or taken from an earlier run
with the same training): minutes. Each method compresses all users' adapters to each ratio, and every user's
held-out loss is measured with the base model, the personal adapter and the compressed one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.record import ROOT, circumstances, store
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.compress import CompressOptions, compress
from soppu.compress.options import ratio
from soppu.data import load_user, tokenize
from soppu.errors import SoppuError
from soppu.federation import emulator
from soppu.federation.train import CachedBlock, cache_states, mean_loss
from soppu.stages.federate import collect, federate
from soppu.stages.run import Run, open_run, prepare

RATIOS = (16.0, 32.0, 64.0)
MORE = (24.0, 48.0, 8.0)  # of the default alone
METHODS: Mapping[str, dict[str, Any]] = {
    "residual": {},
    "svd": {},
    "joint": {"basis_bits": 6, "core_bits": 6},
    "joint-diag": {"basis_bits": 6},
    "cluster": {"clusters": 3, "basis_bits": 6, "core_bits": 6},
    "ternary": {},
}


class Bench:
    """The full model over the cached states of every user's held-out text."""

    def __init__(self, run: Run, layers: int) -> None:
        base = run.base()
        model = models.load_model(base, dtype="float32")
        tokenizer = models.load_tokenizer(base)
        total = len(emulator.decoder_layers(model))
        self.plan = emulator.make_plan(
            model,
            base_hash=base.hash,
            adapter_layers=total - layers,
            drop_ratio=0.0,
            target_modules=run.config.lora.target_modules,
        )
        self.top = emulator.TopModel(model, self.plan)
        bottom = emulator.with_layers(model, self.plan.bottom)
        self.states: dict[str, list[CachedBlock]] = {}
        for user in tqdm(run.config.data.users, desc="states"):
            held = load_user(run.config.data, user).heldout
            blocks = tokenize(
                held,
                tokenizer,
                max_tokens=run.config.data.max_tokens,
                chat_template=run.config.data.chat_template,
            )
            self.states[user] = cache_states(bottom, blocks, pad_id=tokenizer.pad_token_id)

    def loss(self, user: str, adapter: LoraAdapter | None) -> float:
        """Mean held-out loss of one user, nats a token."""
        return mean_loss(self.top, self.plan, self.states[user], adapter=adapter)


def measure(run: Run, adapters: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    """All losses, one row for each method and ratio that can be reached."""
    names = next(iter(adapters.values())).pairs
    bench = Bench(run, min(int(part) for name in names for part in name.split(".") if part.isdigit()))
    base = {user: bench.loss(user, None) for user in adapters}
    personal = {user: bench.loss(user, adapter) for user, adapter in adapters.items()}
    rows = []
    for method, settings in METHODS.items():
        for wanted in (*RATIOS, *MORE) if method == "residual" else RATIOS:
            row = _row(bench, adapters, (base, personal), method=method, wanted=wanted, settings=settings)
            rows += [row] if row else []
    return {"base": base, "personal": personal, "rows": rows}


def _row(
    bench: Bench,
    adapters: Mapping[str, LoraAdapter],
    known: tuple[dict[str, float], dict[str, float]],
    *,
    method: str,
    wanted: float,
    settings: dict[str, Any],
) -> dict[str, Any] | None:
    base, personal = known
    try:
        bundle = compress(adapters, CompressOptions(method=method, ratio=wanted, device="cpu", **settings))
    except SoppuError as error:
        click.echo(f"{method} {wanted:g}x: {error}")
        return None
    size, parameters = len(bundle.to_bytes()), bundle.report.parameters_before
    losses = {user: bench.loss(user, bundle.reconstruct(user)) for user in adapters}
    kept = {user: (base[user] - losses[user]) / (base[user] - personal[user]) for user in adapters}
    gained = math.fsum(base[user] - personal[user] for user in adapters)
    row = {
        "method": method,
        "settings": settings,
        "ratio": ratio(parameters, size),
        "bytes": size,
        "relative_error": bundle.report.relative_error_rms,
        "mean_gain_kept": math.fsum(base[user] - losses[user] for user in adapters) / gained,
        "worst_gain_kept": min(kept.values()),
        "worst_user": min(kept, key=kept.__getitem__),
        "losses": losses,
    }
    click.echo(
        f"{method:10s} {row['ratio']:6.1f}x error {row['relative_error']:.3f}"
        f" mean gain kept {row['mean_gain_kept']:.4f} worst {row['worst_gain_kept']:.4f}"
        f" ({row['worst_user']})"
    )
    return row


@click.command()
@click.option("--run", "folder", type=click.Path(exists=True, path_type=Path), help="A run with adapters.")
def main(folder: Path | None) -> None:
    """Train if need be, compress, measure, write the result file."""
    run = open_run(str(folder or prepare(str(ROOT / "benchmarks" / "personal.toml"))))
    members = run.registry().get_set(collect(str(run.folder), federate(str(run.folder))))
    members = {user: members[user] for user in run.config.data.users}
    adapters = {user: run.registry().get_adapter(adapter_id) for user, adapter_id in members.items()}
    values = measure(run, adapters)
    found = circumstances(seed=run.config.seed) | {
        "what": "held-out gain kept by method and ratio; ratio against adapters at 16 bits a number",
        "run": run.id,
        "users": len(adapters),
        "parameters": sum(adapter.parameters() for adapter in adapters.values()),
    }
    click.echo(f"written: {store('gain', found | values)}")


if __name__ == "__main__":
    main()
