"""Every name of vLLM's that the plugin hangs into or reads, in every supported version, and nothing else.

A test holds each, and the parameters that are relied on, against the sources of the wheels in `WHEELS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from soppu.serve.vllm_plugin import host

WHEELS = ("0.27.0", "0.32.0", "0.33.0")  # one of each minor version in `host.SUPPORTED`


@dataclass(frozen=True)
class Contact:
    """One name.

    Args:
        where: "module:name" or "module:Class.name".
        takes: of a function: the first parameters, as far as they are relied on.
        named: further parameters of a function that are given by name.
        before: (versions, `where` there): where it lay in older versions.
        since: the first minor version that has it; "" for all.
    """

    where: str
    takes: tuple[str, ...] | None = None
    named: tuple[str, ...] = ()
    before: tuple[str, str] | None = None
    since: str = ""

    def place(self, version: str) -> str:
        """`where`, in a version such as "0.32.0"; "" if it is not there."""
        if self.since and _minor(version) < _minor(self.since):
            return ""
        old = self.before
        return old[1] if old and version.startswith(old[0]) else self.where


def owner(contact: Contact) -> tuple[Any, str]:
    """The module or class that holds a name of the vLLM that is installed, and the name."""
    module, _, path = contact.place(host.installed()).partition(":")
    held: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        held = getattr(held, part)
    return held, name


def load(contact: Contact) -> Any:
    """What the name means in the vLLM that is installed."""
    return getattr(*owner(contact))


def replace(contact: Contact, hook: Callable[..., Any]) -> None:
    """Have vLLM call `hook(original, ...)` where it calls this; both may be coroutine functions."""
    holder, name = owner(contact)
    original = getattr(holder, name)

    @wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(holder, name, hooked)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_CPU = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_CARDS = ("0.27.", "vllm.entrypoints.openai.engine.protocol")

# Replaced in the API server.
CREATE_CONFIG = Contact("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("self",))
INIT_ENGINE = Contact("vllm.v1.engine.async_llm:AsyncLLM.__init__", ("self", "vllm_config"))
INIT_MODELS = Contact(f"{_MODELS}.init_static_loras", ("self",))
SHOW_MODELS = Contact(f"{_MODELS}.show_available_models", ("self",))
LOAD_ADAPTER = Contact(f"{_MODELS}.load_lora_adapter", ("self", "request", "base_model_name"))
UNLOAD_ADAPTER = Contact(f"{_MODELS}.unload_lora_adapter", ("self", "request"))
VALIDATE = Contact("vllm.v1.engine.input_processor:InputProcessor._validate_lora", ("self", "lora_request"))
CHECK_MODEL = Contact("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("self", "request"))
CHECK_POOLING_MODEL = Contact(
    "vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model", ("self", "request")
)
ATTACH_ROUTES = Contact(
    "vllm.plugins.endpoint_plugins.interface:attach_endpoint_plugins",
    ("app", "supported_tasks"),
    before=("0.27.", "vllm.entrypoints.openai.api_server:_attach_endpoint_plugins"),
)
BUILD_APP = Contact(  # holds its own reference to ATTACH_ROUTES
    "vllm.entrypoints.launchers.app:attach_endpoint_plugins",
    before=("0.27.", "vllm.entrypoints.openai.api_server:_attach_endpoint_plugins"),
)
# Replaced in the engine and in workers.
COMPUTE_HASH = Contact("vllm.config.vllm:VllmConfig.compute_hash", ("self",))
INIT_EXECUTOR = Contact("vllm.v1.executor.abstract:Executor.__init__", ("self", "vllm_config"))
LOAD_MODEL = {
    "V1": Contact(f"{_V1}.load_model", ("self", "load_dummy_weights")),
    "V1 CPU": Contact(f"{_CPU}.load_model", ("self", "load_dummy_weights")),
    "V2": Contact(f"{_V2}.load_model", ("self", "load_dummy_weights")),
}
DUMMY_RUN = (
    Contact(f"{_V1}._dummy_run", ("self", "num_tokens")),
    Contact(f"{_V2}._dummy_run", ("self", "num_tokens")),
)
PREPARE_V1 = Contact(f"{_V1}._prepare_inputs", ("self", "scheduler_output", "num_scheduled_tokens"))
PREPARE_V2 = Contact(f"{_V2}.prepare_inputs", ("self", "scheduler_output"))
REPLACED = (
    *(
        CREATE_CONFIG,
        INIT_ENGINE,
        INIT_MODELS,
        SHOW_MODELS,
        LOAD_ADAPTER,
        UNLOAD_ADAPTER,
        VALIDATE,
        CHECK_MODEL,
        CHECK_POOLING_MODEL,
        ATTACH_ROUTES,
        BUILD_APP,
    ),
    *(COMPUTE_HASH, INIT_EXECUTOR, *LOAD_MODEL.values(), *DUMMY_RUN, PREPARE_V1, PREPARE_V2),
)

# Used: classes and functions.
LORA_REQUEST = Contact("vllm.lora.request:LoRARequest")
VALIDATION_ERROR = Contact("vllm.exceptions:VLLMValidationError")
MODEL_CARD = Contact(
    "vllm.entrypoints.serve.engine.protocol:ModelCard", before=(_CARDS[0], f"{_CARDS[1]}:ModelCard")
)
ERROR_RESPONSE = Contact(
    "vllm.entrypoints.serve.exception_handling.error_response:create_error_response",
    ("message", "err_type", "status_code"),
    before=("0.27.", "vllm.entrypoints.serve.utils.error_response:create_error_response"),
)
ENGINE_WORKER = Contact("vllm.v1.worker.gpu_worker:Worker")
CURRENT_PLATFORM = Contact("vllm.platforms:current_platform")
LINEAR = Contact("vllm.model_executor.layers.linear:LinearBase")
COLUMN_LINEAR = Contact("vllm.model_executor.layers.linear:ColumnParallelLinear")
ROW_LINEAR = Contact("vllm.model_executor.layers.linear:RowParallelLinear")
QKV_LINEAR = Contact("vllm.model_executor.layers.linear:QKVParallelLinear")
USED = (
    *(LORA_REQUEST, VALIDATION_ERROR, MODEL_CARD, ERROR_RESPONSE, ENGINE_WORKER),
    *(LINEAR, COLUMN_LINEAR, ROW_LINEAR, QKV_LINEAR),
)


def _fields(of: str, *names: str, since: str = "") -> tuple[Contact, ...]:
    dot = "." if ":" in of else ":"
    return tuple(Contact(f"{of}{dot}{name}", since=since) for name in names)


# Read or called, on objects that vLLM hands over.
READ = (
    *_fields(_MODELS, "lora_requests", "lora_resolver_lock", "base_model_paths", "engine_client"),
    *_fields(_MODELS, "registry"),
    Contact("vllm.entrypoints.openai.models.serving:OpenAIModelRegistry.show_available_models", ("self",)),
    *_fields("vllm.envs", "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"),
    Contact(f"{_MODELS}._check_load_lora_adapter_request", ("self", "request")),
    Contact(f"{_MODELS}._check_unload_lora_adapter_request", ("self", "request")),
    *_fields("vllm.lora.request:LoRARequest", "lora_name", "lora_int_id", "lora_path"),
    Contact("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", ("self", "method"), ("args",)),
    *_fields("vllm.v1.engine.async_llm:AsyncLLM", "output_processor"),
    *_fields("vllm.v1.engine.output_processor:OutputProcessor", "request_states"),
    *_fields("vllm.v1.engine.output_processor:RequestState", "lora_request"),
    *_fields(
        "vllm.config.parallel:ParallelConfig", "pipeline_parallel_size", "prefill_context_parallel_size"
    ),
    *_fields("vllm.config.parallel:ParallelConfig", "_api_process_count", "enable_dbo"),
    *_fields("vllm.config.speculative:SpeculativeConfig", "enable_adaptive_verification", since="0.32"),
    *_fields("vllm.config.scheduler:SchedulerConfig", "max_num_batched_tokens", "max_num_seqs"),
    *_fields("vllm.config.compilation:CompilationConfig", "max_cudagraph_capture_size"),
    *_fields("vllm.config.model:ModelConfig", "dtype", "model", "served_model_name"),
    *_fields("vllm.config.vllm:VllmConfig", "lora_config", "parallel_config", "scheduler_config"),
    *_fields("vllm.config.vllm:VllmConfig", "compilation_config", "model_config", "speculative_config"),
    *_fields(_V1, "vllm_config", "device", "model", "input_batch"),
    *_fields("vllm.v1.worker.gpu_input_batch:InputBatch", "request_lora_mapping", "num_reqs"),
    *_fields(_V2, "vllm_config", "device", "model", "lora_state"),
    *_fields("vllm.v1.worker.gpu.lora_utils:LoraState", "lora_ids"),
    *_fields("vllm.v1.worker.gpu.input_batch:InputBatch", "idx_mapping_np", "num_scheduled_tokens"),
    *_fields("vllm.v1.worker.gpu_worker:Worker", "model_runner"),
    *_fields("vllm.model_executor.layers.linear:LinearBase", "input_size", "output_size", "quant_method"),
    *_fields("vllm.model_executor.layers.linear:LinearBase", "tp_rank", "tp_size"),
    *_fields("vllm.model_executor.layers.linear:RowParallelLinear", "input_size_per_partition"),
    *_fields("vllm.model_executor.layers.linear:MergedColumnParallelLinear", "output_sizes"),
    *_fields("vllm.model_executor.layers.linear:QKVParallelLinear", "output_sizes", "num_kv_head_replicas"),
    Contact("vllm.model_executor.layers.linear:LinearMethodBase.apply", ("self", "layer", "x", "bias")),
)
