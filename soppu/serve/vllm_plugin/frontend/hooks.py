"""What hangs in vLLM's API server, for the versions in `host`; engine and workers: `worker.hooks`.

    where it hangs in                                        what for
    EngineArgs.create_engine_config                          what is refused before an engine starts
    OpenAIServingModels, attach_endpoint_plugins             names, adapter routes, admin routes
    BaseServing, PoolingBaseServing._check_model             a user whose page is damaged is refused in time
    InputProcessor._validate_lora                            a user's marker passes without --enable-lora

A user travels as vLLM's own LoRARequest: `lora_int_id` is the row, `lora_path` names the version, so the
prefix cache, which is keyed by name and path, never mixes two users or two versions.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
from collections.abc import Callable, Collection
from http import HTTPStatus
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
from soppu.serve.vllm_plugin import host
from soppu.serve.vllm_plugin.frontend.control import Control, Engine
from soppu.serve.vllm_plugin.frontend.directory import Directory
from soppu.serve.vllm_plugin.frontend.figures import Residency
from soppu.serve.vllm_plugin.host import replace
from soppu.serve.vllm_plugin.settings import Settings

_MARK = "soppu:"


class _Frontend:
    control: Control | None = None


def install(settings: Settings) -> None:
    """Replace what vLLM runs in its API server."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.v1.engine.input_processor import InputProcessor

    replace(EngineArgs, "create_engine_config", functools.partial(_create_config, settings))
    replace(OpenAIServingModels, "init_static_loras", _init_models)
    replace(OpenAIServingModels, "show_available_models", _show_available_models)
    replace(OpenAIServingModels, "load_lora_adapter", _load_lora_adapter)
    replace(OpenAIServingModels, "unload_lora_adapter", _unload_lora_adapter)
    replace(BaseServing, "_check_model", _check_model)
    replace(PoolingBaseServing, "_check_model", _check_pooling_model)
    replace(InputProcessor, "_validate_lora", _validate_lora)
    replace(launcher, "attach_endpoint_plugins", functools.partial(_attach_routes, settings))


def _control() -> Control:
    if _Frontend.control is None:
        raise BundleError("the SOPPU plugin is not up in this process")
    return _Frontend.control


class _Names(dict[str, Any]):
    """vLLM's table of adapter names, answered from the directory.

    Iteration yields nothing, on purpose: vLLM goes through all adapters for every chat request.
    """

    def __init__(self, directory: Directory) -> None:
        super().__init__()
        self._directory = directory

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._directory.resolve(name) is not None

    def __getitem__(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        resolved = self._directory.resolve(name)
        if resolved is None:
            raise KeyError(name)
        return LoRARequest(resolved.label, resolved.row, lora_path=f"{_MARK}{resolved.version}")


def _create_config(settings: Settings, original: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Refuse what can be refused before processes start and weights are read."""
    config = original(args, *rest, **kwargs)
    host.check_options(config)
    served = args.served_model_name or args.model
    names = [served] if isinstance(served, str) else served
    base = models.resolve(config.model_config.model, cache=Path())
    control = Control(settings, base_hash=base.hash, base_model=base.name, reserved=names)
    atexit.register(control.close)
    _Frontend.control = control
    return config


async def _init_models(original: Any, serving: Any) -> None:
    await original(serving)
    control, loop = _control(), asyncio.get_running_loop()
    names = [path.name for path in serving.base_model_paths]
    await asyncio.to_thread(control.connect, _engine(serving.engine_client, loop), reserved=names)
    serving.lora_requests = _Names(control.bank)
    REGISTRY.register(Residency(control))


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
    from vllm.exceptions import VLLMValidationError

    if lora_request is None or not lora_request.lora_path.startswith(_MARK):
        original(processor, lora_request)
        return
    version = lora_request.lora_path.removeprefix(_MARK)
    if not _control().bank.is_current(lora_request.lora_int_id, version):
        raise VLLMValidationError(f"{lora_request.lora_name}: its bundle or adapter was dropped just now")


async def _check_model(original: Any, serving: Any, request: Any) -> Any:
    from vllm.entrypoints.serve import create_error_response

    refused = await original(serving, request)
    if refused is None and (why := await _unreadable(request.model)):
        status = HTTPStatus.FAILED_DEPENDENCY
        refused = create_error_response(message=why, err_type="generation", status_code=status)
    return refused


async def _check_pooling_model(original: Any, serving: Any, request: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    refused = await original(serving, request)
    if refused is None and (why := await _unreadable(request.model)):
        raise VLLMValidationError(why)
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
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    listed = await original(serving)
    for name in _control().bank.names():
        request = serving.lora_requests[name]
        card = ModelCard(id=name, root=request.lora_path, parent=serving.base_model_paths[0].name)
        card.permission = [ModelPermission()]
        listed.data.append(card)
    return listed


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
    from vllm.entrypoints.serve import create_error_response

    try:
        await asyncio.to_thread(change, *args)
    except (AdapterError, BundleError) as error:
        return create_error_response(
            message=str(error), err_type="InvalidUserInput", status_code=HTTPStatus.BAD_REQUEST
        )


def _attach_routes(settings: Settings, original: Any, app: Any, *args: Any, **kwargs: Any) -> None:
    """Add our server's admin routes (same paths, bodies and answers) and /soppu/v1/info."""
    original(app, *args, **kwargs)
    admin = AdminApi(_control, token=settings.admin_token)
    app.router.routes += [Route("/soppu/v1/info", _info, methods=["GET"]), *admin.routes()]
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
