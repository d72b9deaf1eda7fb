"""One gateway process: port, TLS, and what happens to connections that are slow or have to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from soppu.errors import ConfigError
from soppu.gateway import visits
from soppu.gateway.app import Gateway
from soppu.gateway.settings import GatewaySettings
from soppu.registry import Registry
from soppu.serve.port import claim_port

_LOG = logging.getLogger(__name__)


def run(registry: Registry, settings: GatewaySettings) -> None:
    """Serve until the process is told to stop.

    Raises:
        PortTaken: somebody else has the port.
        ConfigError: the certificate, its key, or the issuer's keys cannot be used.
    """
    _log_lines()
    server = GatewayServer(Gateway.of(registry, settings))
    with claim_port(settings.host, settings.port) as listener:
        scheme = "https" if settings.tls.certificate else "http"
        _LOG.info("gateway at %s://%s:%d", scheme, settings.host, listener.getsockname()[1])
        server.run(sockets=[listener])
    _LOG.info("stopped")


class GatewayServer(uvicorn.Server):
    """At SIGTERM or SIGINT it takes nothing new and finishes what is under way, for `grace_s`; then it ends.

    A second signal ends it at once.
    """

    def __init__(self, gateway: Gateway) -> None:
        settings = gateway.settings
        config = uvicorn.Config(
            gateway.app(),
            http=type("Patient", (PatientProtocol,), {"seconds": settings.limits.head_s}),
            ws="none",
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=settings.limits.connections,
            timeout_graceful_shutdown=max(1, round(settings.grace_s)),
            **_tls(settings),
        )
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for a signal."""
        self.force_exit = self.should_exit
        self._gateway.draining = self.should_exit = True

    def stop(self) -> None:
        """As a signal would."""
        self.handle_exit(signal.SIGTERM, None)


def _tls(settings: GatewaySettings) -> dict[str, Any]:
    """Uvicorn's options; the files are tried here, so that what is wrong with them is told by name."""
    tls = settings.tls
    if not tls.certificate:
        return {}
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls.certificate = {tls.certificate!r}, tls.key = {tls.key!r}: {error}") from None
    return {"ssl_certfile": Path(tls.certificate), "ssl_keyfile": Path(tls.key)}


class PatientProtocol(H11Protocol):
    """HTTP on one connection, which is closed where a request's headers take too long.

    uvicorn alone would wait for them as long as the connection lasts.
    """

    seconds = 10.0
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        if self._busy:
            self._done_waiting()
        elif self._due is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._done_waiting()
        super().connection_lost(exc)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._due = self.loop.call_later(self.seconds, self._give_up)

    def _done_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        self._due = None
        if not self._busy and not self.transport.is_closing():
            self.transport.close()


def _log_lines() -> None:
    """Requests are told in JSON alone, one a line, to the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    visits.LOG.addHandler(handler)
    visits.LOG.setLevel(logging.INFO)
    visits.LOG.propagate = False
