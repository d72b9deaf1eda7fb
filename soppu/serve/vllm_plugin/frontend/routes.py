"""The admin routes of `soppu.serve.api.admin` on the application of vLLM: same paths, bodies and answers."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import __version__
from soppu.errors import RequestError
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.responses import on_request_error
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

    api = AdminApi(control, token=token)
    app.router.routes += [Route("/soppu/v1/info", info, methods=["GET"]), *api.routes()]
    app.add_exception_handler(RequestError, on_request_error)
