"""What hangs in vLLM's API server; engine and workers: `worker.hooks`. Where: `contacts`, by these names.

    CREATE_CONFIG, INIT_ENGINE                               what is refused before an engine starts
    INIT_MODELS, SHOW_MODELS, LOAD_ and UNLOAD_ADAPTER       names, adapter routes
    BUILD_APP                                                admin routes
    CHECK_MODEL, CHECK_POOLING_MODEL                         a user whose page is damaged is refused in time
    VALIDATE                                                 a user's marker passes without --enable-lora

A user travels as vLLM's own LoRARequest: `lora_int_id` is the row, `lora_path` names the version, so the
prefix cache, which is keyed by name and path, never mixes two users or two versions.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
from collections.abc import Callable, Collection
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu import __version__, models
from soppu.errors import AdapterError, BundleError, RequestError
from soppu.serve.api.admin import AdminApi
from soppu.serve.api.responses import on_request_error
from soppu.serve.vllm_plugin import contacts, host
from soppu.serve.vllm_plugin.contacts import load, replace
from soppu.serve.vllm_plugin.frontend import listing
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.frontend.directory import NamedRow
from soppu.serve.vllm_plugin.frontend.figures import Residency
from soppu.serve.vllm_plugin.frontend.following import Follower, health
from soppu.serve.vllm_plugin.settings import Settings

_MARK = "soppu:"


class _Frontend:
    control: Control | None = None
    follower: Follower | None = None


def install(settings: Settings) -> None:
    """Replace what vLLM runs in its API server."""
    replace(contacts.CREATE_CONFIG, _create_config)
    replace(contacts.INIT_ENGINE, functools.partial(_init_engine, settings))
    replace(contacts.INIT_MODELS, functools.partial(_init_models, settings))
    replace(contacts.SHOW_MODELS, _show_available_models)
    replace(contacts.LOAD_ADAPTER, _load_lora_adapter)
    replace(contacts.UNLOAD_ADAPTER, _unload_lora_adapter)
    replace(contacts.CHECK_MODEL, _check_model)
    replace(contacts.CHECK_POOLING_MODEL, _check_pooling_model)
    replace(contacts.VALIDATE, _validate_lora)
    replace(contacts.BUILD_APP, functools.partial(_attach_routes, settings))


def _control() -> Control:
    if _Frontend.control is None:
        raise BundleError("the SOPPU plugin is not up in this process")
    return _Frontend.control


class _Names(dict[str, Any]):
    """vLLM's table of adapter names, answered from the directory.

    Iteration yields nothing, on purpose: vLLM goes through all adapters for every chat request.
    """

    def __init__(self, control: Control) -> None:
        super().__init__()
        self._control = control

    def _resolve(self, name: str) -> NamedRow | None:
        bank = self._control.bank
        return bank.resolve(name) or bank.resolve(listing.plain(name, self._control.names_of_base))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._resolve(name) is not None

    def __getitem__(self, name: str) -> Any:
        resolved = self._resolve(name)
        if resolved is None:
            raise KeyError(name)
        request = load(contacts.LORA_REQUEST)
        return request(resolved.label, resolved.row, lora_path=f"{_MARK}{resolved.version}")


def _create_config(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse what can be refused before weights are read; maybe in another process than the engine's."""
    config = original(*args, **kwargs)
    host.check_options(config)
    return config


def _init_engine(
    settings: Settings, original: Any, engine: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Take the state before workers are started, which read it."""
    if _Frontend.control is None:
        model = vllm_config.model_config
        served = model.served_model_name or model.model
        names = [served] if isinstance(served, str) else served
        base = models.resolve(model.model, cache=Path())
        control = Control(settings, base_hash=base.hash, base_model=base.name, reserved=names)
        atexit.register(control.close)
        _Frontend.control = control
    original(engine, vllm_config, *args, **kwargs)


async def _init_models(settings: Settings, original: Any, serving: Any) -> None:
    await original(serving)
    control, loop = _control(), asyncio.get_running_loop()
    names = [path.name for path in serving.base_model_paths]
    await asyncio.to_thread(control.connect, _engine(serving.engine_client, loop), reserved=names)
    serving.lora_requests = _Names(control)
    REGISTRY.register(Residency(control))
    if settings.follow and _Frontend.follower is None:
        _Frontend.follower = Follower(control, settings)
        _Frontend.follower.start()


def _engine(client: Any, loop: asyncio.AbstractEventLoop) -> Engine:
    def call(method: str, *args: Any) -> list[Any]:
        asked = client.collective_rpc("soppu_call", args=(method, *args))
        answers = asyncio.run_coroutine_threadsafe(asked, loop).result()
        if refused := [refusal for refusal, _ in answers if refusal]:
            raise BundleError(refused[0])
        return [value for _, value in answers]

    def busy() -> Collection[int]:
        states = list(client.output_processor.request_states.values())
        return {state.lora_request.lora_int_id for state in states if state.lora_request is not None}

    return Engine(call, busy)


def _validate_lora(original: Any, processor: Any, lora_request: Any) -> None:
    if lora_request is None or not lora_request.lora_path.startswith(_MARK):
        original(processor, lora_request)
        return
    version = lora_request.lora_path.removeprefix(_MARK)
    if not _control().bank.is_current(lora_request.lora_int_id, version):
        raise load(contacts.VALIDATION_ERROR)(
            f"{lora_request.lora_name}: its bundle or adapter was dropped just now"
        )


async def _check_model(original: Any, serving: Any, request: Any) -> Any:
    refused = await original(serving, request)
    if refused is None and (why := await _unreadable(request.model)):
        status = HTTPStatus.FAILED_DEPENDENCY
        refused = load(contacts.ERROR_RESPONSE)(message=why, err_type="generation", status_code=status)
    return refused


async def _check_pooling_model(original: Any, serving: Any, request: Any) -> Any:
    refused = await original(serving, request)
    if refused is None and (why := await _unreadable(request.model)):
        raise load(contacts.VALIDATION_ERROR)(why)
    return refused


async def _unreadable(name: str | None) -> str:
    """Why a user's numbers cannot be read from the bundle, "" where they can."""
    control = _control()
    if not name or not control.unchecked(name):
        return ""
    try:
        await asyncio.to_thread(control.check_user, name)
    except BundleError as error:
        return str(error)
    return ""


async def _show_available_models(original: Any, serving: Any) -> Any:
    """What is listed for callers inside this process; the route is `_models`."""
    listed, control = await original(serving), _control()
    template = listed.data[0].model_dump()
    room = max(0, control.settings.models_limit - len(listed.data))
    for name, version in islice(listing.models(control), room):
        listed.data.append(load(contacts.MODEL_CARD)(**listing.user_card(template, name, version)))
    return listed


async def _models(request: Request) -> Response:
    """`/v1/models` by pages and prefixes; in the place of vLLM's route, whose fields all are there."""
    control, serving = _control(), request.app.state.openai_serving_models
    cards = [card.model_dump() for card in (await serving.registry.show_available_models()).data]
    return JSONResponse(await asyncio.to_thread(listing.body, control, request.query_params, cards))


async def _load_lora_adapter(_: Any, serving: Any, request: Any, base_model_name: str | None = None) -> Any:
    async with serving.lora_resolver_lock[request.lora_name]:
        refused = await serving._check_load_lora_adapter_request(request)
        if refused is None:
            refused = await _refusal(_control().add_adapter, request.lora_name, Path(request.lora_path))
    return refused or f"Success: LoRA adapter '{request.lora_name}' added successfully."


async def _unload_lora_adapter(_: Any, serving: Any, request: Any) -> Any:
    refused = await serving._check_unload_lora_adapter_request(request)
    if refused is None:
        refused = await _refusal(_control().drop_adapter, request.lora_name)
    return refused or f"Success: LoRA adapter '{request.lora_name}' removed successfully."


async def _refusal(change: Callable[..., None], *args: Any) -> Any:
    """Run a change; what vLLM answers where it is refused, None where it is made."""
    try:
        await asyncio.to_thread(change, *args)
    except (AdapterError, BundleError) as error:
        return load(contacts.ERROR_RESPONSE)(
            message=str(error), err_type="InvalidUserInput", status_code=HTTPStatus.BAD_REQUEST
        )


def _attach_routes(settings: Settings, original: Any, app: Any, *args: Any, **kwargs: Any) -> None:
    """Add our server's admin routes (same paths, bodies and answers), /soppu/v1/info and /soppu/v1/health."""
    original(app, *args, **kwargs)
    admin = AdminApi(_control, token=settings.admin_token)
    own = [
        Route("/soppu/v1/info", _info, methods=["GET"]),
        Route("/soppu/v1/health", _health, methods=["GET"]),
    ]
    app.router.routes += [*own, *admin.routes()]
    app.add_exception_handler(RequestError, on_request_error)


async def _info(_: Request) -> Response:
    control = _control()
    return JSONResponse(
        {
            "server": "soppu-vllm",
            "version": __version__,
            "base_hash": control.base.hash,
            "model_id": control.model,
            "active": control.bank.active,
        }
    )


async def _health(_: Request) -> Response:
    """200 where this server serves what it should, 503 where it cannot take over what is published."""
    well, told = health(_control(), _Frontend.follower)
    return JSONResponse(told, status_code=200 if well else 503)
