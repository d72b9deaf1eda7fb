"""What a server counts: LoRAX's figures under LoRAX's names, and those of each adapter, which LoRAX lacks.

LoRAX's counters carry no `_total`, which the library adds; it is taken off again where they are written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from soppu.errors import RequestError
from soppu.serve.api import residency
from soppu.serve.engine.engine import Engine
from soppu.serve.engine.generation import Event, Finish, Generation, GenerationRequest, Sink
from soppu.serve.names import split_version

MAX_ADAPTERS = 256  # more have one label together: every label value is a series for ever
OTHER = "(other)"
_SECONDS = [0.0001 * 1.5 ** (n + 1) for n in range(35)]  # LoRAX's
_ADAPTER_SECONDS = (0.1, 0.5, 1.0, 5.0, 30.0)
_OF_LORAX = "lorax_"
_TYPE_LINES = re.compile(rf"^(# (?:HELP|TYPE) {_OF_LORAX}\w+)_total ", re.MULTILINE)
# LoRAX's word for a failure, by our error types, which are those of its answers
_CAUSES = {"incomplete_generation": "incomplete", "template_error": "template"}
_GONE = 499


class Metrics:
    """The figures of one application. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self._count = Counter("lorax_request_count", "Generation requests", registry=registry)
        self._success = Counter("lorax_request_success", "Generations that were finished", registry=registry)
        self._failure = Counter(
            "lorax_request_failure", "Generations that were not, by cause", ["err"], registry=registry
        )
        self._validation = self._seconds("lorax_request_validation_duration", "Reading the prompt")
        self._total = self._seconds("lorax_request_duration", "From the request to its last token")
        self._queue = self._seconds("lorax_request_queue_duration", "Waiting for a row of the batch")
        self._inference = self._seconds("lorax_request_inference_duration", "In the batch")
        self._per_token = self._seconds("lorax_request_mean_time_per_token_duration", "In the batch, a token")
        self._input = self._tokens("lorax_request_input_length", engine.max_input_tokens)
        self._generated = self._tokens("lorax_request_generated_tokens", engine.max_total_tokens)
        self._asked = self._tokens("lorax_request_max_new_tokens", engine.max_total_tokens)
        self._requests = Counter(
            "soppu_adapter_requests", "Generations by adapter", ["adapter", "outcome"], registry=registry
        )
        self._adapter_tokens = Counter(
            "soppu_adapter_tokens", "Tokens by adapter", ["adapter", "kind"], registry=registry
        )
        self._latency = Histogram(
            "soppu_adapter_request_duration_seconds",
            "From the request to its last token, by adapter",
            ["adapter"],
            registry=registry,
            buckets=_ADAPTER_SECONDS,
        )
        self._gauge("lorax_queue_length", "Requests that wait").set_function(lambda: engine.waiting)
        self._gauge("lorax_batch_current_size", "Requests in the batch").set_function(lambda: engine.running)
        resident = Gauge("soppu_adapters_resident", "Adapters in memory", ["kind"], registry=registry)
        resident.labels("user").set_function(lambda: engine.bank.figures().count)
        resident.labels("single").set_function(lambda: len(engine.bank.adapters()))
        resident.labels("path").set_function(lambda: len(engine.bank.residents()))
        self._gauge("soppu_bundles_resident", "Bundles in memory").set_function(
            lambda: len(engine.bank.bundles())
        )
        registry.register(_CacheFigures(engine))
        registry.register(_Residency(engine))
        self._resident = Gauge(
            "soppu_adapter_resident", "1 while the adapter is in memory", ["adapter"], registry=registry
        )

    @property
    def registry(self) -> CollectorRegistry:
        """Where others of this application put their figures."""
        return self._registry

    def text(self) -> str:
        """All figures as Prometheus reads them."""
        return _TYPE_LINES.sub(r"\1 ", generate_latest(self).decode())

    def as_json(self) -> dict[str, Any]:
        """All figures as LoRAX answers them to `Accept: application/json`."""
        return {
            metric.name: {"type": metric.type, "data": [_entry(sample) for sample in metric.samples]}
            for metric in self.collect()
        }

    def collect(self) -> Iterator[Metric]:
        """The registry's families without the times of creation, LoRAX's under LoRAX's names."""
        for adapter in list(self._adapters):
            self._resident.labels(adapter).set(self._engine.bank.in_memory(adapter))
        for metric in self._registry.collect():
            metric.samples = [_named(sample) for sample in metric.samples if not _is_creation(sample)]
            yield metric

    def refused(self, error: RequestError) -> None:
        """A request that no generation was begun for, once however often it is told."""
        if not getattr(error, "counted", False):
            self._count.inc()
            self._fail(error)

    def submitted(self, generation: Generation, seconds: float) -> None:
        """The engine has taken a request."""
        self._count.inc()
        self._validation.observe(seconds)
        self._input.observe(len(generation.job.prompt))
        self._asked.observe(generation.job.limit)

    def finished(self, adapter: str, finish: Finish) -> None:
        """A generation has come to its end."""
        label, inference = self._label(adapter), finish.total - finish.queued
        self._success.inc()
        self._total.observe(finish.total)
        self._queue.observe(finish.queued)
        self._inference.observe(inference)
        self._per_token.observe(inference / max(finish.generated_tokens, 1))
        self._generated.observe(finish.generated_tokens)
        self._requests.labels(label, "success").inc()
        self._adapter_tokens.labels(label, "prompt").inc(finish.prompt_tokens)
        self._adapter_tokens.labels(label, "generated").inc(finish.generated_tokens)
        self._latency.labels(label).observe(finish.total)

    def failed(self, adapter: str, error: RequestError) -> None:
        """A generation that was begun has failed; other rows of its batch may share the error."""
        self._fail(error)
        self._requests.labels(self._label(adapter), "failure").inc()

    def _fail(self, error: RequestError) -> None:
        error.counted = True  # type: ignore[attr-defined]  # it may come by here again on its way out
        cause = "bad_request" if error.status in (400, 413, 415) else error.error_type
        self._failure.labels("dropped" if error.status == _GONE else _CAUSES.get(cause, cause)).inc()

    def _label(self, adapter: str) -> str:
        if adapter in self._adapters or not adapter:
            return adapter
        if len(self._adapters) >= MAX_ADAPTERS:
            return OTHER
        self._adapters.add(adapter)
        return adapter

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, registry=self._registry)

    def _seconds(self, name: str, what: str) -> Histogram:
        return Histogram(name, f"{what}, in seconds", registry=self._registry, buckets=_SECONDS)

    def _tokens(self, name: str, most: int) -> Histogram:
        edges = [most / 100 * (n + 1) for n in range(100)]
        return Histogram(name, "Tokens", registry=self._registry, buckets=edges)


class _CacheFigures(Collector):
    """What the engine's cache of keys and values counts itself."""

    def __init__(self, engine: Engine) -> None:
        self._cache = engine.cache

    def collect(self) -> Iterator[Metric]:
        """Blocks by state, and prompt tokens that were found there."""
        figures = self._cache.figures()
        what = f"Blocks of the keys and values of {figures.block_tokens} tokens in one layer"
        blocks = GaugeMetricFamily("soppu_cache_blocks", what, labels=["state"])
        for state in ("total", "used", "cached"):
            blocks.add_metric([state], getattr(figures, state))
        yield blocks
        what = "Bytes of a block, once there are any"
        yield GaugeMetricFamily("soppu_cache_block_bytes", what, value=figures.block_bytes)
        what = "Prompt tokens that another request had read, in the base model's layers and in the user's own"
        tokens = CounterMetricFamily("soppu_prefix_tokens", what, labels=["layers", "outcome"])
        for layers, asked in figures.asked.items():
            found = figures.reused[layers]
            tokens.add_metric([layers, "hit"], found)
            tokens.add_metric([layers, "miss"], asked - found)
        yield tokens


class _Residency(Collector):
    """Who is served, and who of them is in memory."""

    def __init__(self, engine: Engine) -> None:
        self._bank = engine.bank

    def collect(self) -> Iterator[Metric]:
        """See `residency.families`."""
        yield from residency.families(self._bank.figures(), self._bank.bundles(), active=self._bank.active)


class MeteredEngine:
    """An engine whose requests are counted; in everything else it is the engine it was given."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: GenerationRequest, *, sink: Sink) -> Generation:
        """As `Engine.submit`; every end of the request is counted."""
        metrics, begun = self._metrics, time.perf_counter()

        def counting(event: Event) -> None:
            if isinstance(event, RequestError):
                metrics.failed(self._adapter(request.adapter_id), event)
            elif event.finish is not None:
                metrics.finished(self._adapter(request.adapter_id), event.finish)
            sink(event)

        try:
            generation = self._engine.submit(request, sink=counting)
        except RequestError as error:
            metrics.refused(error)
            raise
        metrics.submitted(generation, time.perf_counter() - begun)
        return generation

    def _adapter(self, asked: str) -> str:
        """The name without its version, so that a user is one label through all versions."""
        return asked if asked in self._engine.bank.adapters() else split_version(asked)[0]


def _is_creation(sample: Sample) -> bool:
    return sample.name.endswith("_created")


def _named(sample: Sample) -> Sample:
    ours = not sample.name.startswith(_OF_LORAX)
    return sample if ours else sample._replace(name=sample.name.removesuffix("_total"))


def _entry(sample: Sample) -> dict[str, Any]:
    labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
    return {"key": f"{sample.name}{{{labels}}}" if labels else sample.name, "value": sample.value}
