"""Flower's SuperLink with its Control API kept to the operator: `python -m server.superlink OPTIONS`.

Flower serves nodes and operators at one port and asks only nodes who they are. Whoever could reach the
port could register a key of their own, and run a program of their own on every user's machine. Here
everything but the Fleet API, where a key is asked for, is answered on the SuperLink's own machine alone.

SOPPU_OPERATORS names further addresses that may do what an operator may, with commas between them.
The options are those of `flower-superlink`.
"""

from __future__ import annotations

import ipaddress
import os

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from flwr.superlink.main import _get_middleware
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from soppu.errors import FederationError

OPERATORS = "SOPPU_OPERATORS"
_FOR_ALL = ("/v1/fleet/", "/health")


class OperatorsOnly:
    """ASGI middleware: strangers reach the Fleet API and nothing else.

    Args:
        operators: addresses that may do everything, beside this machine's own.
    """

    def __init__(self, app: ASGIApp, *, operators: frozenset[str]) -> None:
        self._app = app
        self._operators = operators

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may be asked from where it is asked."""
        if scope["type"] == "lifespan" or scope["path"].startswith(_FOR_ALL) or self._is_operator(scope):
            await self._app(scope, receive, send)
            return
        why = f"only the SuperLink's own machine may ask for this, and whom {OPERATORS} names"
        refusal = JSONResponse({"detail": why}, 403)  # which Flower's commands show
        await refusal(scope, receive, send)

    def _is_operator(self, scope: Scope) -> bool:
        peer = (scope.get("client") or ("", 0))[0]
        own = (scope.get("server") or ("", 0))[0]
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return address.is_loopback or peer == own or str(address) in self._operators


def main() -> None:
    """Start the SuperLink. It reads its options from the command line itself.

    Raises:
        FederationError: this Flower takes no middleware from us; it would be open to everybody.
    """
    operators = frozenset(filter(None, map(str.strip, os.environ.get(OPERATORS, "").split(","))))
    # Flower's hook for middleware, asked for once when its application is made
    extensions.get_middleware = lambda: (Middleware(OperatorsOnly, operators=operators),)
    if not any(getattr(item, "cls", None) is OperatorsOnly for item in _get_middleware()):
        raise FederationError("this version of Flower leaves out what keeps its Control API to the operator")
    flower_superlink()


if __name__ == "__main__":
    main()
