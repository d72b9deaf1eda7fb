"""The admin routes of `soppu.serve.api.admin` on the application of vLLM: same paths, bodies and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import __version__
from soppu.errors import RequestError
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.responses import error_body
from soppu.serve.bank.protocol import Served
from soppu.serve.vllm_plugin.frontend.control import Control

SERVER = "soppu-vllm"


def attach(app: Starlette, control: Callable[[], Control], *, token: str) -> None:
    """Add the routes and /soppu/v1/info. `control` is asked at each request: the application comes first."""

    async def info(_: Request) -> Response:
        served = control()
        return JSONResponse(
            {
                "server": SERVER,
                "version": __version__,
                "base_hash": served.base.hash,
                "model_id": served.model,
                "active": served.bank.active,
            }
        )

    api = AdminApi(cast(Served, _Late(control)), token=token)
    app.router.routes += [Route("/soppu/v1/info", info, methods=["GET"]), *api.routes()]
    app.add_exception_handler(RequestError, _on_refusal)


class _Late:
    """Whatever `make` gives, asked anew for every attribute."""

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)
