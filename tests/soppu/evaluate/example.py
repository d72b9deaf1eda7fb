"""Made-up inputs of a report, for as many users as a test wants."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean
from typing import Any

from soppu.basis_settings import BasisConfig
from soppu.compress.bundle.report import CompressionReport
from soppu.compress.linalg.certificate import Certificate
from soppu.config import Config
from soppu.evaluate import report
from soppu.evaluate.gate import check
from soppu.evaluate.losses import ExampleLosses, UserLosses
from soppu.evaluate.refit import Probe, decide
from soppu.evaluate.report import ReportInputs

HOSTILE = "<script>alert('1')</script>&\"|`$\\foo$\x1b[31m\u202e]]> --><img src=x onerror=y>"
LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def make_losses(users: list[str], seed: int = 0, **changes: Any) -> list[UserLosses]:
    """Everybody is best served their own adapter, and gains by it; examples of a user differ."""
    rng = random.Random(seed)
    made = []
    for user in users:
        base, gain = rng.uniform(2.0, 3.5), rng.uniform(0.05, 0.6)
        means = {
            "base": base,
            "shared": base - gain * rng.uniform(0.5, 0.9),
            "personal": base - gain,
            "compressed": base - gain * rng.uniform(0.92, 1.0),
        }
        losses = UserLosses(user, 16, **means, validation_shared=2.0, validation_compressed=1.9)
        made.append(replace(losses, each=make_examples(means, rng), **changes))
    return made


def make_examples(means: dict[str, float], rng: random.Random, count: int = 16) -> ExampleLosses:
    """Examples of 20 tokens with these means; what they have in common is the same in every column."""
    noise = [rng.gauss(0.0, 0.5) for _ in range(count)]
    noise = [value - fmean(noise) for value in noise]
    own = {name: [rng.gauss(0.0, 0.05) for _ in noise] for name in means}
    sums = {
        name: tuple(20 * (mean + a + b - fmean(own[name])) for a, b in zip(noise, own[name], strict=True))
        for name, mean in means.items()
    }
    return ExampleLosses((20,) * count, sums)


def make_compression(users: list[str], seed: int = 0) -> CompressionReport:
    rng = random.Random(seed)
    modules = [f"model.layers.{layer}.{leaf}" for layer in (26, 27, 28, 29) for leaf in LEAVES]
    errors = {name: {user: rng.uniform(0.05, 0.3) for user in users} for name in modules}
    count = float(len(users))
    return CompressionReport(
        method="residual",
        rank=64,
        clusters=1,
        target="16x",
        whitened=False,
        seed=0,
        device="cpu",
        storage="integers of 2 to 8 bits, entropy coded",
        seconds=3.2,
        k_used={name: 8 + 8 * (number % 4) for number, name in enumerate(modules)},
        steps=dict.fromkeys(modules, 7),
        relative_error={user: rng.uniform(0.1, 0.2) for user in users},
        module_error=errors,
        certificates=dict.fromkeys(modules, Certificate(0.02 * count, 0.0225 * count, 0.03 * count, count)),
        parameters_before=300_000 * len(users),
        parameters_after=600_000 + 16_000 * len(users),
    )


def make_received(form: str) -> dict[str, Any]:
    ternary = form == "ternary"
    return {
        "form": form,
        "bytes_up": 9_000 if ternary else 310_000,
        "loss_float32": 2.3,
        "loss_ternary": 2.305 if ternary else None,
    }


def make_federation(users: list[str]) -> dict[str, Any]:
    """What server/app.py writes into result.json."""
    rounds = [
        {
            "round": number,
            "mode": "personal" if number == 3 else "shared",
            "bytes_down": 620_000 * len(users),
            "bytes_up": 310_000 * len(users),
            "seconds": 20.5,
            "train_loss": 2.5 - 0.1 * number,
            "emulator_loss": 2.6 - 0.1 * number,
            "shared_loss": 2.7 - 0.1 * number,
            "public_loss": 2.8 - 0.1 * number if number < 3 else 0.0,
            "accepted": users[1:] if number == 2 else users,
            "received": {
                user: make_received("ternary" if number == 3 and user != users[-1] else "float32")
                for user in (users[1:] if number == 2 else users)
            },
            "refused": {users[0]: f"{users[0]}: lora_A holds NaN or Inf"} if number == 2 else {},
        }
        for number in (1, 2, 3)
    ]
    return {
        "adapters": {user: f"a-{index:016x}" for index, user in enumerate(users)},
        "served": dict.fromkeys(users, "personal"),
        "plan": {"kept": [0, 1, 3, 5], "adapter_layers": [6, 7], "hash": "c" * 64, "json": "{}"},
        "align": {"before": {"l2": 0.31, "kl": 1.2}, "after": {"l2": 0.12, "kl": 0.4}},
        "rounds": rounds,
        "refused": {"late": "no answer in time"},
        "mode": "finetune",
        "privacy": {
            "at": "server",
            "clip": 1.0,
            "noise": 4.0,
            "releases": 2,
            "delta": 1e-5,
            "epsilon": 1.38,
            "not_covered": "losses and example counts",
        },
    }


def make_serving(users: list[str]) -> dict[str, Any]:
    """What soppu/stages/publish.py writes of the first live target."""
    return {
        "target": "embedded",
        "url": "http://127.0.0.1:8099",
        "bundle_id": "b" * 64,
        "canaries": dict.fromkeys(users, ""),
        "prompt": "def main():",
        "completions": {users[0]: "\n    return {1: '<b>&'}\n"},
        "asked_as": {users[0]: users[0]},
    }


def make_target(**changes: Any) -> dict[str, Any]:
    """What soppu/stages/publish.py notes of one publication."""
    values = {"name": "embedded", "target": "embedded", "form": "bundle", "url": "http://127.0.0.1:8099"}
    took = {"users": 8, "push_s": 1.5, "canaries_s": 0.5}
    return {**values, "bundle_id": "b" * 64, **took, "error": "", **changes}


def make_basis() -> dict[str, Any]:
    """What soppu/stages/refit.py finds: one of two probes' cores keeps little."""
    probes = [Probe("user-0000", "a-1", 0.7, 0.1, 0.09), Probe("user-0001", "a-2", 0.8, 0.1, 0.02)]
    return decide("u-0123456789abcdef", probes, BasisConfig()).to_dict()


def make_stage(name: str, seconds: float, attempts: int = 1) -> dict[str, Any]:
    """What tasks/recording.py writes into stages/NAME.json."""
    return {"name": name, "seconds": seconds, "attempts": attempts}


def make_inputs(count: int = 8, *, users: list[str] | None = None, **changes: Any) -> ReportInputs:
    """Inputs for `count` users, or for those named."""
    users = users or [f"user-{number:04d}" for number in range(count)]
    compression, losses = make_compression(users), make_losses(users)
    told = make_federation(users)
    values: dict[str, Any] = {
        "run": "run-1",
        "config": Config(),
        "losses": losses,
        "adapter_ids": told["adapters"],
        "compression": compression,
        "bytes_before": 1_230_000 * count,
        "bytes_after": 1_300_000 + 33_000 * count,
        "verdict": check(losses, compression.relative_error, Config().gate),
        "set_id": "s-0123456789abcdef",
        "bundle_id": "b" * 64,
        "basis": make_basis(),
        "federation": told,
        "serving": make_serving(users),
        "targets": (make_target(),),
        "stages": (make_stage("federate", 171.0, 2), make_stage("compress", 3.4), make_stage("publish", 6.5)),
        "created": "2026-01-02T03:04:05+00:00",
        "hardware": "Linux, 2 cores",
    }
    return ReportInputs(**{**values, **changes})


def make_report(count: int = 8, **changes: Any) -> dict[str, Any]:
    return report.build(make_inputs(count, **changes))
