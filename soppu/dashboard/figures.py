"""What a server's `/metrics` come to: requests, tokens, latency, of everybody and of one user.

Names are those of the embedded server, of LoRAX and of vLLM; a name that a server does not have says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

# samples that say the same; the first that a server has is read
_REQUESTS = ("soppu_adapter_requests_total", "lorax_request_success", "vllm:request_success_total")
_TOKENS = ("soppu_adapter_tokens_total", "lorax_request_generated_tokens_sum", "vllm:generation_tokens_total")
_LATENCY = (
    "soppu_adapter_request_duration_seconds_bucket",
    "lorax_request_duration_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
)
_WAITING = ("lorax_queue_length", "vllm:num_requests_waiting")
Sample = tuple[dict[str, str], float]  # labels, value
Buckets = dict[float, float]  # upper edge in seconds -> how many took at most that


@dataclass
class Traffic:
    """Of everybody, or of one adapter, since the server was started."""

    requests: float = 0.0
    failures: float = 0.0
    tokens: float = 0.0  # generated
    buckets: Buckets = field(default_factory=dict)

    def quantile(self, share: float) -> float | None:
        """Seconds within which so many requests ended, as Prometheus' histogram_quantile reads buckets."""
        return quantile(sorted(self.buckets.items()), share)


@dataclass(frozen=True)
class Figures:
    """One look at one server."""

    total: Traffic
    users: dict[str, Traffic]  # as far as the server tells them apart
    waiting: float | None


def read(text: str) -> Figures:
    """Figures of what a server answers. ValueError where that is no Prometheus text. O(its length)."""
    samples: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    total, users = Traffic(), dict[str, Traffic]()
    for labels, value in _first(samples, _REQUESTS):
        failed = labels.get("outcome") == "failure"
        for one in (total, _of(users, labels)):
            one.failures += value if failed else 0.0
            one.requests += 0.0 if failed else value
    for labels, value in _first(samples, _TOKENS):
        if labels.get("kind", "generated") == "generated":
            for one in (total, _of(users, labels)):
                one.tokens += value
    for labels, value in _first(samples, _LATENCY):
        edge = float(labels["le"])
        for one in (total, _of(users, labels)):
            one.buckets[edge] = one.buckets.get(edge, 0.0) + value
    return Figures(total, users, _gauge(samples, _WAITING))


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """Linear within the bucket; None where nothing was counted."""
    count = buckets[-1][1] if buckets else 0.0
    if not count:
        return None
    wanted, edge, before = share * count, 0.0, 0.0
    for upper, many in buckets:
        if many >= wanted:
            if upper == float("inf"):
                return edge
            return edge + (upper - edge) * (wanted - before) / max(many - before, 1e-12)
        edge, before = upper, many
    return edge


def _of(users: dict[str, Traffic], labels: dict[str, str]) -> Traffic:
    """The traffic of the user that a label names; versions of one user are one."""
    return users.setdefault(labels.get("adapter", "").partition("@")[0], Traffic())


def _first(samples: Mapping[str, list[Sample]], names: Sequence[str]) -> list[Sample]:
    return next((samples[name] for name in names if name in samples), [])


def _gauge(samples: Mapping[str, list[Sample]], names: Sequence[str]) -> float | None:
    found = _first(samples, names)
    return sum(value for _, value in found) if found else None
