"""Cross-validation: what each policy would have chosen for prompts that it was not fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from soppu.serve.router.measured import Ints, Measured
from soppu.serve.router.policies import FITTED, ORACLE, Options, choose, fit

FOLDS = 5


def folds(digests: Sequence[str], *, count: int, seed: int) -> Ints:
    """(n,) the fold of every prompt, by content: equal prompts are in one fold, whoever asked."""
    told = [hashlib.sha256(f"{seed} {digest}".encode()).digest() for digest in digests]
    return np.array([int.from_bytes(one[:8], "big") % count for one in told], dtype=np.int64)


def choices(measured: Measured, options: Options, *, count: int = FOLDS, seed: int = 0) -> dict[str, Ints]:
    """Policy -> (n,) arms chosen, each prompt judged by policies fitted on the other folds; and the oracle's.

    A prior of `options` is left out: it was measured on prompts that are judged here.
    """
    blind = replace(options, prior={})
    found = {name: np.zeros(len(measured), dtype=np.int64) for name in FITTED}
    fold = folds(measured.digests, count=count, seed=seed)
    for number in np.unique(fold):
        judged, seen = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if not len(seen):  # one fold alone has all prompts, which are one prompt then
            raise ValueError("cross-validation needs two different prompts or more")
        for name, chosen in found.items():
            policy = fit(name, measured.at(seen), blind)
            chosen[judged] = choose(policy.expect(measured.asked.at(judged)), blind)
    return {**found, ORACLE: measured.losses.argmin(1)}
