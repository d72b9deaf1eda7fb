"""Policies: from what is known of a request to how each arm is expected to do, and from that to an arm.

A policy says how many nats a token it expects of every arm. One rule then chooses, for all alike: the
cheapest arm that is expected to be within the tolerance of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from soppu.errors import RouterError
from soppu.serve.router.measured import BASE, CHEAPER, PERSONAL, Arm, Floats, Ints, Measured, Questions

TOLERANCE = 0.01  # nats a token: what the gate does not tell from noise either
NEIGHBOURS = 16
ORACLE = "oracle"  # knows the losses; no policy of a server


class Policy(Protocol):
    """What is expected of every arm. `needs`: the columns of `Questions` that it reads beside the users."""

    @property
    def needs(self) -> frozenset[str]:
        """Columns of `Questions`."""
        ...

    def expect(self, asked: Questions) -> Floats:
        """(m, arms) nats a token, each up to something that all arms of a request share."""
        ...


@dataclass(frozen=True)
class Options:
    """How policies are fitted and arms chosen; `prior`: users' nats a token by arm, measured elsewhere."""

    arms: Sequence[Arm]
    neighbours: int = NEIGHBOURS
    tolerance: float = TOLERANCE
    prior: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Always:
    """One arm, whoever asks."""

    arm: int
    arms: int
    needs: frozenset[str] = frozenset()

    def expect(self, asked: Questions) -> Floats:
        """0 of the one arm, infinitely much of the others."""
        return _only(np.full(len(asked), self.arm), self.arms)


@dataclass(frozen=True, eq=False)
class Gain:
    """By what was measured of the user as a whole; of a user who was not measured, the mean over users."""

    users: Mapping[str, Floats]
    needs: frozenset[str] = frozenset()

    def expect(self, asked: Questions) -> Floats:
        """The user's measured losses. O(m)."""
        others = np.mean(list(self.users.values()), axis=0)
        return np.array([self.users.get(user, others) for user in asked.users])


@dataclass(frozen=True, eq=False)
class Neighbours:
    """By the k measured prompts whose states are nearest (cosine, each number standardised).

    Neighbours are the user's own where there are k of them: it is their adapter that would answer. Else they
    are anybody's.
    """

    measured: Measured
    k: int
    needs: frozenset[str] = frozenset({"vectors"})

    def expect(self, asked: Questions) -> Floats:
        """Mean losses of the k nearest, a token. O(m n d)."""
        states = self.measured.asked.vectors
        middle, spread = states.mean(0), states.std(0) + 1e-9
        near = _unit((states - middle) / spread)
        found = np.empty((len(asked), self.measured.losses.shape[1]))
        own = self.measured.of_users()
        everybody = np.arange(len(self.measured))
        names = np.array(asked.users, dtype=object)
        for user in set(asked.users):
            rows, pool = np.flatnonzero(names == user), own.get(user, everybody)
            if len(pool) < self.k:
                pool = everybody
            alike = _unit((asked.vectors[rows] - middle) / spread) @ near[pool].T
            chosen = pool[np.argsort(-alike, axis=1, kind="stable")[:, : self.k]]
            tokens = self.measured.tokens[chosen].sum(1)
            found[rows] = self.measured.losses[chosen].sum(1) / tokens[:, None]
        return found


@dataclass(frozen=True)
class Length:
    """One arm for prompts of fewer tokens than `edge`, another for the others."""

    edge: int
    short: int
    long: int
    arms: int
    needs: frozenset[str] = frozenset({"lengths"})

    @classmethod
    def of(cls, measured: Measured) -> Length:
        """The edge and the two arms of the smallest summed loss. O(n log n + n arms)."""
        order = np.argsort(measured.asked.lengths, kind="stable")
        lengths, losses = measured.asked.lengths[order], measured.losses[order]
        below = np.vstack([np.zeros(losses.shape[1]), losses.cumsum(0)])
        above = below[-1] - below
        # an edge lies before the first prompt of a length, or behind all
        cuts = np.append(np.flatnonzero(np.diff(lengths, prepend=-1)), len(lengths))
        best = cuts[int(np.argmin(below[cuts].min(1) + above[cuts].min(1)))]
        edge = int(lengths[best]) if best < len(lengths) else int(lengths[-1]) + 1
        return cls(edge, int(below[best].argmin()), int(above[best].argmin()), losses.shape[1])

    def expect(self, asked: Questions) -> Floats:
        """0 of the arm of the prompt's length."""
        return _only(np.where(asked.lengths < self.edge, self.short, self.long), self.arms)


@dataclass(frozen=True)
class Likelihood:
    """By how likely each arm finds the prompt itself: what reads the user better may write like them too."""

    needs: frozenset[str] = frozenset({"reading"})

    def expect(self, asked: Questions) -> Floats:
        """Nats a token of the prompt."""
        return asked.reading


def _always(arm: str) -> Callable[[Measured, Options], Policy]:
    return lambda _, options: Always([one.name for one in options.arms].index(arm), len(options.arms))


def _gain(measured: Measured, options: Options) -> Policy:
    prior = {user: np.array(losses, dtype=np.float64) for user, losses in options.prior.items()}
    return Gain(measured.means() | prior)


def _neighbours(measured: Measured, options: Options) -> Policy:
    return Neighbours(measured, min(options.neighbours, len(measured)))


def _length(measured: Measured, options: Options) -> Policy:
    return Length.of(measured)


def _likelihood(measured: Measured, options: Options) -> Policy:
    return Likelihood()


FITTED: Mapping[str, Callable[[Measured, Options], Policy]] = {
    PERSONAL: _always(PERSONAL),
    BASE: _always(BASE),
    CHEAPER: _always(CHEAPER),
    "gain": _gain,
    "neighbours": _neighbours,
    "length": _length,
    "likelihood": _likelihood,
}


def names(arms: Sequence[str]) -> tuple[str, ...]:
    """The policies there are where these arms are: one that is always an arm needs that arm."""
    return tuple(name for name in FITTED if name != CHEAPER or CHEAPER in arms)


def known(name: str, arms: Sequence[str]) -> str:
    """The name itself. RouterError where no policy has it, or its arm is not there."""
    allowed = names(arms)
    if name not in allowed:
        raise RouterError(f"router policy {name!r}, allowed: {', '.join(allowed)}")
    return name


def fit(name: str, measured: Measured, options: Options) -> Policy:
    """The policy of this name, from what was measured. RouterError for another name."""
    return FITTED[known(name, [arm.name for arm in options.arms])](measured, options)


def choose(expected: Floats, options: Options) -> Ints:
    """(m,) places of arms: the cheapest within the tolerance of the best; of equal ones the first."""
    prices = np.array([arm.bytes for arm in options.arms])
    allowed = expected <= expected.min(1, keepdims=True) + options.tolerance
    return np.where(allowed, prices, np.inf).argmin(1)


def _only(chosen: Ints, arms: int) -> Floats:
    return np.where(np.arange(arms) == chosen[:, None], 0.0, np.inf)


def _unit(rows: Floats) -> Floats:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
