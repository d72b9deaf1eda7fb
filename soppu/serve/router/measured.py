"""What a router learns from and is asked about: prompts, and what every arm made of them. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BASE, PERSONAL, CHEAPER = "base", "personal", "cheaper"


@dataclass(frozen=True)
class Arm:
    """One way to answer. `adapter` is the request's adapter id, with `{user}` for the user's name.

    `bytes` of the user's own numbers are touched for a request, in the mean over users; 0 for the base model.
    """

    name: str
    adapter: str
    bytes: float

    def adapter_id(self, user: str) -> str:
        """What a request of this user has to name."""
        return self.adapter.replace("{user}", user)


@dataclass(frozen=True, eq=False)
class Questions:
    """What is known of m requests before anything is generated; columns that nobody asks for may be empty."""

    users: Sequence[str]
    lengths: Ints  # (m,) tokens of the prompt
    vectors: Floats  # (m, d) mean state of the prompt's tokens below the lowest adapted layer
    reading: Floats  # (m, arms) nats a token that the prompt itself costs each arm

    def __len__(self) -> int:
        """How many requests."""
        return len(self.users)

    def at(self, index: Ints) -> Questions:
        """Some of them, in this order."""
        users = [self.users[place] for place in index.tolist()]
        return Questions(users, self.lengths[index], self.vectors[index], self.reading[index])


@dataclass(frozen=True, eq=False)
class Measured:
    """n prompts with what was measured on them."""

    asked: Questions
    digests: Sequence[str]  # content hash of each prompt: equal prompts are one, whoever asked
    tokens: Ints  # (n,) tokens of the completion
    losses: Floats  # (n, arms) nats, summed over the completion

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.tokens)

    def at(self, index: Ints) -> Measured:
        """Some of them, in this order."""
        digests = [self.digests[place] for place in index.tolist()]
        return Measured(self.asked.at(index), digests, self.tokens[index], self.losses[index])

    def of_users(self) -> dict[str, Ints]:
        """User -> places of their prompts, by name."""
        names = np.array(self.asked.users, dtype=object)
        return {user: np.flatnonzero(names == user) for user in sorted(set(self.asked.users))}

    def means(self) -> dict[str, Floats]:
        """User -> (arms,) nats a token over all of their prompts."""
        return {
            user: self.losses[places].sum(0) / self.tokens[places].sum()
            for user, places in self.of_users().items()
        }
