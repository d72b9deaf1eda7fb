"""How requests go to the servers: httpcore's pool on asyncio's own streams, each request written at once.

httpx's transport sends a request's head and body in two writes, and turns through anyio for each. On one
machine a write is a tenth of a millisecond, and wakes the server; so what is written waits here until the
answer is asked for.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpcore
import httpx
from httpcore import AsyncNetworkBackend, AsyncNetworkStream

_AT_ONCE = 1 << 16  # bytes that wait at most
_AS_HTTPX = (  # the first that fits
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.TimeoutException, httpx.ReadTimeout),
    (httpcore.NetworkError, httpx.ReadError),
    (httpcore.ProtocolError, httpx.RemoteProtocolError),
)


class Outbound(httpx.AsyncBaseTransport):
    """A transport of httpx for plain requests: no proxies, no redirects, HTTP/1.1.

    Args:
        kept: connections that are kept open while nobody uses them.
    """

    def __init__(self, *, kept: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(trust_env=False),
            max_connections=None,
            max_keepalive_connections=kept,
            keepalive_expiry=5.0,
            network_backend=Streams(),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Raises what httpx's own transport raises."""
        url = request.url
        asked = httpcore.Request(
            request.method,
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx():
            answer = await self._pool.handle_async_request(asked)
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._answer.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except tuple(core for core, _ in _AS_HTTPX) as error:
        kind = next(known for core, known in _AS_HTTPX if isinstance(error, core))
        raise kind(str(error)) from error


class Streams(AsyncNetworkBackend):
    """asyncio's streams for httpcore."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> AsyncNetworkStream:
        """See httpcore; neither a local address nor options are given by this gateway."""
        async with _within(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
            return Stream(*await asyncio.open_connection(host, port))

    async def sleep(self, seconds: float) -> None:
        """See httpcore."""
        await asyncio.sleep(seconds)


class Stream(AsyncNetworkStream):
    """One connection. What is written goes out when an answer is read, or there is much of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._unsent: list[bytes] = []

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore."""
        await self._send(timeout)
        async with _within(timeout, httpcore.ReadTimeout, httpcore.ReadError):
            return await self._reader.read(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See httpcore."""
        self._unsent.append(buffer)
        if sum(map(len, self._unsent)) > _AT_ONCE:
            await self._send(timeout)

    async def aclose(self) -> None:
        """See httpcore."""
        self._writer.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> AsyncNetworkStream:
        """See httpcore."""
        try:
            async with _within(timeout, httpcore.ConnectTimeout, httpcore.ConnectError):
                await self._writer.start_tls(ssl_context, server_hostname=server_hostname)
        except (httpcore.ConnectTimeout, httpcore.ConnectError):
            self._writer.close()
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        """See httpcore, which asks whether an idle connection is readable: then it has been closed there."""
        if info != "is_readable":
            return self._writer.get_extra_info(info)
        looked = select.poll()
        looked.register(self._writer.get_extra_info("socket").fileno(), select.POLLIN)
        return self._reader.at_eof() or self._writer.is_closing() or bool(looked.poll(0))

    async def _send(self, timeout: float | None) -> None:
        if not self._unsent:
            return
        whole = b"".join(self._unsent)
        self._unsent.clear()
        async with _within(timeout, httpcore.WriteTimeout, httpcore.WriteError):
            self._writer.write(whole)
            await self._writer.drain()


@asynccontextmanager
async def _within(
    seconds: float | None, late: type[Exception], broken: type[Exception]
) -> AsyncIterator[None]:
    """What goes wrong on a connection, in httpcore's words."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise late(f"not within {seconds} s") from None
    except OSError as error:  # TLS has its own kinds of it
        raise broken(str(error)) from error
