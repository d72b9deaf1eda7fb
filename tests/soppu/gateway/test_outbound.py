"""The gateway's own way to servers, before servers that speak HTTP by hand."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from soppu.gateway.outbound import Outbound
from tests.soppu.gateway.test_sockets import certificate

Speaks = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def before(speaks: Speaks, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that does as `speaks` says on each connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await speaks(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    address = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    async with server, httpx.AsyncClient(transport=Outbound(kept=2), base_url=address, timeout=5) as client:
        yield client


async def request_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return head, await reader.readexactly(length)


def test_head_and_body_come_in_one_piece() -> None:
    pieces: list[bytes] = []

    async def speaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 20):
            pieces.append(piece)
            writer.write(_OK)

    async def main() -> None:
        async with before(speaks) as client:
            for _ in range(3):
                assert (await client.post("/generate", content=b"x" * 5000)).text == "ok"

    asyncio.run(main())
    assert [piece.count(b"x" * 5000) for piece in pieces] == [1, 1, 1]


@pytest.mark.parametrize("size", [0, 1 << 10, 3 << 20])
def test_a_body_of_any_size_arrives_and_a_stream_comes_piece_by_piece(size: int) -> None:
    got: list[bytes] = []
    asked = asyncio.Event()

    async def speaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await request_of(reader)
        got.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in (b"one", b"two"):
            writer.write(b"3\r\n" + part + b"\r\n")
            await asked.wait()  # the second comes once the first has been read
        writer.write(b"0\r\n\r\n")

    async def main() -> list[bytes]:
        found = []
        async with before(speaks) as client, client.stream("POST", "/", content=b"y" * size) as answer:
            async for part in answer.aiter_raw():
                found.append(part)
                asked.set()
        return found

    assert asyncio.run(main()) == [b"one", b"two"]
    assert got == [b"y" * size]


def test_a_connection_is_used_again_until_the_server_has_closed_it() -> None:
    connections: list[int] = []

    async def speaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        for _ in range(2):
            await request_of(reader)
            connections[-1] += 1
            writer.write(_OK)

    async def main() -> None:
        async with before(speaks) as client:
            for _ in range(5):
                assert (await client.post("/", content=b"a")).text == "ok"
                await asyncio.sleep(0.05)  # the end has come by the next request

    asyncio.run(main())
    assert connections == [2, 2, 1]


async def _silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def _deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def _half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request_of(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    await writer.drain()


async def _babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request_of(reader)
    writer.write(b"what?\r\n\r\n")
    await writer.drain()


async def _abort(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request_of(reader)
    writer.transport.abort()


@pytest.mark.parametrize(
    ("speaks", "error"),
    [
        (_silent, httpx.ReadTimeout),
        (_deaf, (httpx.RemoteProtocolError, httpx.ReadError)),
        (_half, httpx.RemoteProtocolError),
        (_babble, httpx.RemoteProtocolError),
        (_abort, (httpx.RemoteProtocolError, httpx.ReadError)),
    ],
)
def test_what_goes_wrong_is_told_in_httpx_s_words(speaks: Speaks, error: type[Exception]) -> None:
    async def main() -> None:
        async with before(speaks) as client:
            await client.post("/", content=b"a", timeout=0.3)

    with pytest.raises(error):
        asyncio.run(main())


def test_where_nobody_listens_or_takes_the_connection_is_told() -> None:
    async def main() -> None:
        async with before(_silent) as client:
            address = client.base_url
        async with httpx.AsyncClient(transport=Outbound(kept=2)) as client:
            await client.post(address)

    with pytest.raises(httpx.ConnectError):
        asyncio.run(main())


def test_a_body_that_nobody_takes_is_given_up() -> None:
    async def stuffed(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1)

    async def main() -> None:
        async with before(stuffed) as client:
            await client.post("/", content=b"z" * (64 << 20), timeout=0.3)

    with pytest.raises((httpx.ReadTimeout, httpx.WriteTimeout)):
        asyncio.run(main())


def test_a_server_s_certificate_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made, key)

    async def speaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(_OK)
        await writer.drain()

    async def main() -> str:
        async with before(speaks, tls=tls) as client:
            return (await client.post("/", content=b"a")).text

    with pytest.raises(httpx.ConnectError, match="certificate"):
        asyncio.run(main())
    trusting = ssl.create_default_context(cafile=str(made))
    trusting.check_hostname = False
    monkeypatch.setattr(httpx, "create_ssl_context", lambda trust_env: trusting)
    assert asyncio.run(main()) == "ok"
