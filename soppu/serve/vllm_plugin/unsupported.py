"""Options of vLLM that the plugin does not support. Which versions of vLLM: `versions`."""

from __future__ import annotations

from typing import Any

from soppu.errors import ConfigError


def refuse(config: Any) -> None:
    """ConfigError naming the first option of `config`, a VllmConfig, that the plugin cannot serve under."""
    if config.lora_config is not None:
        raise ConfigError(
            "--enable-lora and SOPPU_BUNDLE exclude each other: a bundle needs no --enable-lora"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        size = config.parallel_config.pipeline_parallel_size
        raise ConfigError(
            f"--pipeline-parallel-size {size}: the SOPPU plugin supports 1; tensor parallel is allowed"
        )
    if config.parallel_config._api_process_count > 1:
        count = config.parallel_config._api_process_count
        raise ConfigError(
            f"--api-server-count {count}: the SOPPU plugin keeps its names in one, start with 1"
        )
    if config.parallel_config.enable_dbo:
        raise ConfigError("--enable-dbo: the SOPPU plugin needs whole batches; start without it")
    if config.use_v2_model_runner:
        raise ConfigError("the SOPPU plugin supports model runner V1; start with VLLM_USE_V2_MODEL_RUNNER=0")
