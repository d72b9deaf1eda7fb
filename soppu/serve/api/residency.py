"""Who is served, and who of them is in memory, as Prometheus reads it: in the `/metrics` of both servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from soppu.serve.bank.resident import Figures


def families(figures: Figures, bundles: Mapping[str, Sequence[str]], *, active: str) -> Iterator[Metric]:
    """Users of each bundle version; users in memory, and what came and went."""
    what = "Users of a loaded bundle, by the first 12 digits of its id and whether plain names mean it"
    users = GaugeMetricFamily("soppu_bundle_users", what, labels=["bundle", "active"])
    for bundle_id, names in bundles.items():
        users.add_metric([bundle_id[:12], "true" if bundle_id == active else "false"], len(names))
    yield users
    count = GaugeMetricFamily("soppu_resident_users", "Users of bundles in memory", labels=["state"])
    count.add_metric(["in_use"], figures.used)
    count.add_metric(["idle"], figures.count - figures.used)
    yield count
    gauges = {
        "soppu_resident_bytes": ("Bytes that the users in memory take", figures.weight),
        "soppu_resident_limit_bytes": ("Bytes that users may take, beside those in use", figures.limit),
    }
    for name, (what, value) in gauges.items():
        yield GaugeMetricFamily(name, what, value=value)
    what = "Times that a user's numbers were taken for a request, or a batch"
    yield CounterMetricFamily("soppu_resident_uses", what, value=figures.uses)
    what = "Times that a user had to be read from the bundle for that"
    reads = CounterMetricFamily("soppu_resident_reads", what, labels=["outcome"])
    reads.add_metric(["success"], figures.reads - figures.failures)
    reads.add_metric(["failure"], figures.failures)
    yield reads
    what = "Users who were let go to make room"
    yield CounterMetricFamily("soppu_resident_evictions", what, value=figures.evictions)
