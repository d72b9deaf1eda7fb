"""How often a user may ask, and for how many tokens: counted by the package `limits`, in this process."""

from __future__ import annotations

import time
from collections import Counter

import limits
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter

from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits


class Budgets:
    """Rates of requests and budgets of tokens. Several gateways count each by itself."""

    def __init__(self, settings: Limits) -> None:
        storage = MemoryStorage()
        self._requests = limits.parse_many(settings.requests) if settings.requests else []
        self._tokens = limits.parse_many(settings.tokens) if settings.tokens else []
        self._rate = MovingWindowRateLimiter(storage)
        self._budget = FixedWindowRateLimiter(storage)
        self._promised: Counter[str] = Counter()

    def request(self, user: str) -> None:
        """Count one request. Refused: 429 with the seconds until there is room."""
        for item in self._requests:
            if not self._rate.hit(item, "requests", user):
                raise Refused(
                    429, f"at most {item} of one user", after=_until(self._rate, item, "requests", user)
                )

    def promise(self, user: str, tokens: int) -> None:
        """Set tokens aside that a request may need at most. Refused: 429 where the budget has not so many."""
        for item in self._tokens:
            if not self._budget.test(item, "tokens", user, cost=self._promised[user] + tokens):
                per = f"{item.amount} tokens a {item.GRANULARITY.name}"
                why = f"at most {per} of one user; this request may need {tokens}"
                raise Refused(429, why, after=_until(self._budget, item, "tokens", user))
        if self._tokens:
            self._promised[user] += tokens

    def settle(self, user: str, *, promised: int, used: int) -> None:
        """Count what a request took in the place of what was set aside for it."""
        if not self._tokens:
            return
        self._promised[user] -= promised
        if not self._promised[user]:
            del self._promised[user]
        for item in self._tokens:
            if used:
                self._budget.hit(item, "tokens", user, cost=used)


def _until(limiter: RateLimiter, item: RateLimitItem, *who: str) -> float:
    return limiter.get_window_stats(item, *who).reset_time - time.time()
