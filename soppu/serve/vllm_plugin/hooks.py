"""All contact with vLLM's internals, for the versions in `versions`. What is hung in here is made elsewhere.

    process      where it hangs in                               what for
    API server   EngineArgs.create_engine_config             what is refused before an engine starts
    API server   OpenAIServingModels, attach_endpoint_plugins    names, adapter routes, admin routes
    API server   InputProcessor._validate_lora                   a user's marker passes without --enable-lora
    worker       ModelRunner.load_model, VllmConfig.compute_hash wrapping the adapted layers
    worker       ModelRunner._prepare_inputs, _dummy_run         which rows the tokens of a pass use
    worker       Worker.soppu_call                               changes asked for by the API server
    engine       Executor.__init__                               a worker's refusal ends the engine in silence

A user travels as vLLM's own LoRARequest: `lora_int_id` is the row, `lora_path` names the version, so the
prefix cache, which is keyed by name and path, never mixes two users or two versions.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from soppu import models
from soppu.compress.bundle.bundle import Bundle
from soppu.errors import AdapterError, BundleError, SoppuError
from soppu.serve.vllm_plugin import refusal, unsupported
from soppu.serve.vllm_plugin.frontend import routes
from soppu.serve.vllm_plugin.frontend.control import Control, Engine, read_first
from soppu.serve.vllm_plugin.frontend.directory import Directory
from soppu.serve.vllm_plugin.settings import Settings
from soppu.serve.vllm_plugin.worker import kernels, op
from soppu.serve.vllm_plugin.worker.layout import Linear, Part
from soppu.serve.vllm_plugin.worker.resident import Form
from soppu.serve.vllm_plugin.worker.static import Limits
from soppu.serve.vllm_plugin.worker.worker import Worker

_MARK = "soppu:"
_ABSORBED = (
    "kv_b_proj",
)  # attention reads these weights itself: a change of the layer's output is never seen


def install(settings: Settings) -> None:
    """Hang the plugin into this process, whatever its part in the server is."""
    op.register()
    _install_worker(settings)
    _install_frontend(settings)


# ---- worker


def _install_worker(settings: Settings) -> None:
    from vllm.config import VllmConfig
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker as EngineWorker

    runners = [GPUModelRunner]
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        runners.append(CPUModelRunner)
    for runner in runners:
        if "load_model" in vars(runner):
            runner.load_model = _load_model(runner.load_model, settings)
    GPUModelRunner._prepare_inputs = _prepare_inputs(GPUModelRunner._prepare_inputs)
    GPUModelRunner._dummy_run = _dummy_run(GPUModelRunner._dummy_run)
    EngineWorker.soppu_call = _call
    VllmConfig.compute_hash = _compute_hash(VllmConfig.compute_hash)
    Executor.__init__ = _start_workers(Executor.__init__)


def _start_workers(original: Any) -> Any:
    @functools.wraps(original)
    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        with refusal.followed():
            original(self, *args, **kwargs)

    return start


def _load_model(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        with refusal.noted():
            self.soppu = _attach(self, settings)

    return load_model


def _attach(runner: Any, settings: Settings) -> Worker:
    config = runner.vllm_config
    form = Form(dtype=config.model_config.dtype, device=runner.device, spare=settings.spare_rows)
    layers = dict(_linears(runner.model))
    bundle, bundle_id = read_first(settings)
    how: Any
    if settings.kernel == "static" or form.device.type != "cpu":
        how = _limits(config, bundle)
    else:
        how = kernels.choose(settings.kernel, device=form.device, dtype=form.dtype)
    worker = Worker([line for line, _ in layers.values()], how, form, bundle=bundle, bundle_id=bundle_id)
    for number, linear in enumerate(worker.step.linears):
        layer = layers[linear.name][1]
        layer.quant_method = _adapted(layer.quant_method, number)
    _Fingerprint.value = worker.fingerprint
    how_much = f"{len(bundle.users)} users, {len(worker.step.linears)} of {len(layers)} layers adapted"
    _say(f"bundle {bundle_id[:12]}: {how_much}, {getattr(how, '__name__', 'static')} kernel")
    return worker


def _say(what: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.soppu").info(what)  # only loggers below "vllm" are shown


def _limits(config: Any, bundle: Bundle) -> Limits:
    """Buffers for the longest pass, padded ones included, and bases for two bundles like the first."""
    scheduler, recorded = config.scheduler_config, config.compilation_config.max_cudagraph_capture_size
    clusters = int(bundle.cluster.max()) + 1
    return Limits(
        tokens=max(scheduler.max_num_batched_tokens, recorded or 0),
        requests=scheduler.max_num_seqs,
        bases=2 * clusters,
    )


def _linears(model: Any) -> Iterator[tuple[str, tuple[Linear, Any]]]:
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    for name, layer in model.named_modules():
        prefix, dot, leaf = name.rpartition(".")
        if isinstance(layer, LinearBase) and leaf not in _ABSORBED:
            names = [f"{prefix}{dot}{part}" for part in packed.get(leaf, [leaf])]
            row = isinstance(layer, RowParallelLinear)
            size = layer.input_size_per_partition if row else layer.input_size
            first = layer.tp_rank * size if row else 0
            parts = tuple(_parts(layer, names))
            out = parts[-1].at + parts[-1].size
            yield name, (Linear(name, first=first, size=size, out=out, parts=parts), layer)


def _parts(layer: Any, names: list[str]) -> Iterator[Part]:
    """The modules of one layer, as this rank holds them; nothing where they cannot be told apart."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

    sharded = isinstance(layer, ColumnParallelLinear)
    size, rank = (layer.tp_size, layer.tp_rank) if sharded else (1, 0)
    wholes = list(getattr(layer, "output_sizes", None) or [layer.output_size])
    if len(names) == 1:
        wholes = [sum(wholes)]  # one module in the base model too, for instance c_attn
    at = 0
    for number, (name, whole) in enumerate(zip(names, wholes, strict=True)):
        local, first = whole // size, rank * (whole // size)
        if isinstance(layer, QKVParallelLinear) and number > 0:  # few KV heads are copied to several ranks
            whole //= layer.num_kv_head_replicas
            first = rank // layer.num_kv_head_replicas * local
        yield Part(name, shape=(whole, layer.input_size), first=first, size=local, at=at)
        at += local


def _adapted(method: Any, number: int) -> Any:
    """The layer's own method with the users' change on top: before any all-reduce."""
    base = type(method)

    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        y = base.apply(self, layer, x, bias)
        torch.ops.soppu.apply(x, y, number)
        return y

    made = copy.copy(method)
    made.__class__ = type(f"Adapted{base.__name__}", (base,), {"apply": apply})
    return made


def _prepare_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def prepare(self: Any, output: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.input_batch.request_lora_mapping[: self.input_batch.num_reqs]
        self.soppu.step.begin(rows, counts)
        return original(self, output, counts, *args, **kwargs)

    return prepare


def _dummy_run(original: Any) -> Any:
    @functools.wraps(original)
    def dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.soppu.step.clear()
        return original(self, *args, **kwargs)

    return dummy_run


def _call(self: Any, method: str, *args: Any) -> list[Any]:
    """One method of our Worker; what it refuses is an answer, an exception would be an engine fault."""
    try:
        return ["", getattr(self.model_runner.soppu, method)(*args)]
    except SoppuError as error:
        return [str(error), None]


class _Fingerprint:
    value = ""


def _compute_hash(original: Any) -> Any:
    @functools.wraps(original)
    def compute_hash(self: Any) -> str:
        """Compiled graphs are cached by this hash: one with our operator must not meet one without."""
        whole = f"{original(self)} soppu 1 {_Fingerprint.value}"
        return hashlib.sha256(whole.encode()).hexdigest()[:10]

    return compute_hash


# ---- API server


def _install_frontend(settings: Settings) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.input_processor import InputProcessor

    EngineArgs.create_engine_config = _create_config(EngineArgs.create_engine_config, settings)
    OpenAIServingModels.init_static_loras = _init_models(OpenAIServingModels.init_static_loras)
    for name, replaced in (
        ("show_available_models", _show_available_models),
        ("load_lora_adapter", _load_lora_adapter),
        ("unload_lora_adapter", _unload_lora_adapter),
    ):
        setattr(OpenAIServingModels, name, replaced(getattr(OpenAIServingModels, name)))
    InputProcessor._validate_lora = _validate_lora(InputProcessor._validate_lora)
    launcher.attach_endpoint_plugins = _attach_routes(launcher.attach_endpoint_plugins, settings)


class _Frontend:
    control: Control | None = None


def _control() -> Control:
    if _Frontend.control is None:
        raise BundleError("the SOPPU plugin is not up in this process")
    return _Frontend.control


class _Names(dict[str, Any]):
    """vLLM's table of adapter names, answered from the directory.

    Iteration finds nothing, on purpose: vLLM goes through all adapters for every chat request.
    """

    def __init__(self, directory: Directory) -> None:
        super().__init__()
        self._directory = directory

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._directory.resolve(name) is not None

    def __getitem__(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        found = self._directory.resolve(name)
        if found is None:
            raise KeyError(name)
        return LoRARequest(found.label, found.row, lora_path=f"{_MARK}{found.version}")


def _create_config(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What can be refused before processes start and weights are read is refused here."""
        config = original(self, *args, **kwargs)
        unsupported.refuse(config)
        served = self.served_model_name or self.model
        names = [served] if isinstance(served, str) else served
        base = models.resolve(config.model_config.model, cache=Path())
        control = Control(settings, base_hash=base.hash, base_model=base.name, reserved=names)
        atexit.register(control.close)
        _Frontend.control = control
        return config

    return create_engine_config


def _init_models(original: Any) -> Any:
    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        await original(self)
        control, loop = _control(), asyncio.get_running_loop()
        names = [path.name for path in self.base_model_paths]
        await asyncio.to_thread(control.connect, _engine(self.engine_client, loop), reserved=names)
        self.lora_requests = _Names(control.bank)

    return init_static_loras


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


def _validate_lora(original: Any) -> Any:
    @functools.wraps(original)
    def validate(self: Any, lora_request: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        if lora_request is None or not lora_request.lora_path.startswith(_MARK):
            original(self, lora_request)
        elif not _control().bank.is_current(
            lora_request.lora_int_id, lora_request.lora_path.removeprefix(_MARK)
        ):
            raise VLLMValidationError(f"{lora_request.lora_name}: its bundle or adapter was dropped just now")

    return validate


def _show_available_models(original: Any) -> Any:
    @functools.wraps(original)
    async def show(self: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        listed = await original(self)
        for name in _control().bank.names():
            request = self.lora_requests[name]
            card = ModelCard(id=name, root=request.lora_path, parent=self.base_model_paths[0].name)
            card.permission = [ModelPermission()]
            listed.data.append(card)
        return listed

    return show


def _load_lora_adapter(original: Any) -> Any:
    @functools.wraps(original)
    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        async with self.lora_resolver_lock[request.lora_name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return refused
            try:
                await asyncio.to_thread(_control().add_adapter, request.lora_name, Path(request.lora_path))
            except (AdapterError, BundleError) as error:
                return _error(error)
        return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    return load


def _unload_lora_adapter(original: Any) -> Any:
    @functools.wraps(original)
    async def unload(self: Any, request: Any) -> Any:
        refused = await self._check_unload_lora_adapter_request(request)
        if refused is not None:
            return refused
        try:
            await asyncio.to_thread(_control().drop_adapter, request.lora_name)
        except AdapterError as error:
            return _error(error)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    return unload


def _error(error: Exception) -> Any:
    from vllm.entrypoints.serve import create_error_response

    return create_error_response(
        message=str(error), err_type="InvalidUserInput", status_code=HTTPStatus.BAD_REQUEST
    )


def _attach_routes(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def attach(app: Any, *args: Any, **kwargs: Any) -> None:
        original(app, *args, **kwargs)
        routes.attach(app, _control, token=settings.admin_token)

    return attach
