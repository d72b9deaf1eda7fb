"""When shared rounds are over: neither the users' validation loss nor that of public text falls any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_over(rounds: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` rounds have lowered neither loss below what it was before them.

    Args:
        rounds: the shared rounds so far; a round in which nobody was accepted tells nothing.

    The users' loss of a round is that of the adapter they were sent: it lags one round behind the public one.
    """
    told = [log for log in rounds if log["accepted"]]
    losses = [[float(log[name]) for log in told] for name in ("shared_loss", "public_loss")]
    return all(_has_stalled(values, patience) for values in losses)


def _has_stalled(losses: Sequence[float], patience: int) -> bool:
    before, last = losses[:-patience], losses[-patience:]
    return bool(before) and not min(last) < min(before)
