"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from soppu.gateway.settings import Names

MAX_USERS = 256  # more have one label together: every label value is a series for ever
OTHER = "(other)"
_SECONDS = (0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)


class Figures:
    """The figures of one gateway; `users` says how they are told apart by user."""

    def __init__(self, users: Names, name: Callable[[str, Names], str]) -> None:
        self._how, self._name = users, name
        self._known: set[str] = set()
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "soppu_gateway_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "soppu_gateway_request_seconds",
            "From a request's headers to the end of its answer",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._by_user = Counter(
            "soppu_gateway_user_requests", "Requests by user", ["user", "status"], registry=registry
        )
        self._tokens = Counter(
            "soppu_gateway_user_tokens", "Tokens of prompts and answers by user", ["user"], registry=registry
        )

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A figure that is looked up when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(value)

    def visited(self, route: str, user: str, *, status: int, seconds: float, tokens: int) -> None:
        """Count one request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if user and self._how != "none":
            label = self._label(self._name(user, self._how))
            self._by_user.labels(label, str(status)).inc()
            self._tokens.labels(label).inc(tokens)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self.registry)

    def _label(self, user: str) -> str:
        if user not in self._known:
            if len(self._known) >= MAX_USERS:
                return OTHER
            self._known.add(user)
        return user
