"""Routers of handmade measurements, for servers of the tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from soppu.serve.router import file as files
from soppu.serve.router.file import RouterFile
from soppu.serve.router.measured import Arm, Measured, Questions
from soppu.serve.router.policies import Options
from tests.soppu.serve import tiny

ARMS = (Arm("base", "", 0.0), Arm("personal", "{user}", 100.0))


def measured(
    count: int = 40, *, users: Sequence[str] = ("alice", "bob"), seed: int = 0, arms: int = 2
) -> Measured:
    """Random prompts whose users take turns; some of them twice, by another user."""
    draw = np.random.default_rng(seed)
    asked = Questions(
        [users[n % len(users)] for n in range(count)],
        draw.integers(1, 40, count),
        draw.normal(size=(count, 32)),
        draw.uniform(1, 3, (count, arms)),
    )
    tokens = draw.integers(1, 20, count)
    losses = draw.uniform(1, 3, (count, arms)) * tokens[:, None]
    return Measured(asked, [f"{n // 2 if n < 8 else n:064x}" for n in range(count)], tokens, losses)


def router(
    bundle_id: str,
    *,
    policy: str = "gain",
    prior: dict[str, tuple[float, float]] | None = None,
    base_hash: str = tiny.BASE_HASH,
) -> RouterFile:
    """By default alice gains nothing from her adapter, and bob does."""
    prior = {"alice": (2.0, 2.0), "bob": (2.0, 1.0)} if prior is None else prior
    options = Options(ARMS, neighbours=3, prior=prior)
    return RouterFile(
        "tiny", base_hash, bundle_id, "run", 1, 48, policy, "a test", "a test", options, measured(), ()
    )


def written(path: Path, found: RouterFile) -> Path:
    files.write(path, found)
    return path
