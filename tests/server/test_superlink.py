"""Who reaches what of the SuperLink: nodes the Fleet API, operators everything, strangers nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server import superlink
from server.superlink import OperatorsOnly
from soppu.errors import FederationError

CONTROL = "/v1/control/start-run"


def answer(path: str, *, peer: Any, own: str = "10.0.0.1", kind: str = "http") -> int:
    """The status of an answer; 200 is the application's behind."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": kind,
        "path": path,
        "client": peer and (peer, 4000),
        "server": (own, 8000),
        "method": "POST",
    }
    guard = OperatorsOnly(application, operators=frozenset({"10.0.0.9", "2001:db8::9"}))
    asyncio.run(guard({**scope, "headers": [], "query_string": b""}, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("peer", ["10.0.0.5", "2001:db8::5", "127.0.0.1", "", None, "unix"])
def test_nodes_reach_the_fleet_api_from_everywhere(peer: str | None) -> None:
    assert answer("/v1/fleet/activate-node", peer=peer) == 200
    assert answer("/health", peer=peer) == 200


@pytest.mark.parametrize(
    "path",
    [
        CONTROL,
        "/v1/control/register-node",
        "/v1/runtime/pull-messages",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/fleet",
    ],
)
@pytest.mark.parametrize("peer", ["10.0.0.5", "2001:db8::5", "", None, "unix", "10.0.0.99"])
def test_strangers_reach_nothing_else(path: str, peer: str | None) -> None:
    assert answer(path, peer=peer) == 403


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.5.5.5", "::1", "10.0.0.1", "10.0.0.9", "2001:db8::9"])
def test_this_machine_and_operators_reach_everything(peer: str) -> None:
    assert answer(CONTROL, peer=peer) == 200


def test_other_kinds_of_connection_are_no_way_around() -> None:
    assert answer(CONTROL, peer="10.0.0.5", kind="websocket") == 403


def test_a_flower_that_would_leave_the_guard_out_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink.extensions, "get_middleware", tuple)  # put back at the end
    started: list[str] = []
    monkeypatch.setattr(superlink, "flower_superlink", lambda: started.append("yes"))
    monkeypatch.setenv(superlink.OPERATORS, " 10.0.0.9, ,10.0.0.8")
    superlink.main()
    assert started == ["yes"]
    guard = next(item for item in superlink._get_middleware() if item.cls is OperatorsOnly)
    assert guard.kwargs["operators"] == {"10.0.0.9", "10.0.0.8"}
    monkeypatch.setattr(superlink, "_get_middleware", list)
    with pytest.raises(FederationError, match="Control API"):
        superlink.main()
    assert started == ["yes"]
