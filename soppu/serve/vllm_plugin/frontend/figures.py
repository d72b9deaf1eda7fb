"""Residency: the plugin's figures in vLLM's `/metrics`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from soppu.errors import BundleError
from soppu.serve.api import residency
from soppu.serve.bank.resident import Figures
from soppu.serve.vllm_plugin.frontend.control import Control

_LOG = logging.getLogger(__name__)


class Residency(Collector):
    """Users and versions as they are; of the workers' memory, what they answered since the last scrape.

    A scrape holds the server's event loop, so it cannot wait for the workers, who answer between two passes.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._figures = Figures()
        self._asking = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """See `residency.families`."""
        threading.Thread(target=self._ask, daemon=True).start()
        bank = self._control.bank
        yield from residency.families(self._figures, bank.bundles(), active=bank.active)

    def describe(self) -> Iterator[Metric]:
        """Names alone: nobody is asked when this is registered."""
        yield from residency.families(Figures(), {}, active="")

    def _ask(self) -> None:
        if self._asking.acquire(blocking=False):
            try:
                self._figures = self._control.figures()
            except BundleError as error:
                _LOG.warning("the workers do not tell who is in memory: %s", error)
            finally:
                self._asking.release()
