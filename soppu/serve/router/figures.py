"""What a router counts: decisions by policy and arm, requests it passed by, and seconds spent deciding."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class RouterFigures:
    """The figures of one router, in the registry of its server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "soppu_router_decisions",
            "Requests decided on: the policy's arm, the arm that answers, and why it does",
            ["policy", "choice", "arm", "mode"],
            registry=registry,
        )
        self._passed = Counter(
            "soppu_router_passed",
            "Requests there was nothing to decide of, by why",
            ["why"],
            registry=registry,
        )
        self._seconds = Histogram(
            "soppu_router_deciding_seconds", "Deciding", ["policy"], registry=registry, buckets=_SECONDS
        )

    def decided(self, policy: str, choice: str, *, arm: str, mode: str, seconds: float) -> None:
        """A policy has chosen `choice`, and `arm` answers."""
        self._decisions.labels(policy, choice, arm, mode).inc()
        self._seconds.labels(policy).observe(seconds)

    def passed(self, why: str) -> None:
        """A request stays what it is."""
        self._passed.labels(why).inc()
