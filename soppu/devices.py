"""Which device is computed on, what it is fast at, and how much memory it has left."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import torch

from soppu.errors import ConfigError

_CGROUPS = (  # folder, limit, use, and what of the use is files that can be read again: versions 2 and 1
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def torch_device(name: str, *, key: str) -> torch.device:
    """The device that a setting names: auto, cpu, cuda or cuda:N; auto takes CUDA where there is one.

    Args:
        key: the setting, for the message.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key} = {name!r}, allowed: auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} = {name!r}, this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def multiplies_bfloat16() -> bool:
    """Whether this machine's GPU, or without one its processor, has instructions for products of bfloat16.

    A processor without them takes several times as long as for float32. Where torch cannot tell, it has none.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    told: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)  # not of old
    capabilities = told()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def idle_cores() -> int:
    """Cores that nobody works on just now, at least 1: more threads than that wait for each other. 0.3 s."""
    cores = os.cpu_count() or 1
    return max(1, round(cores * (1 - psutil.cpu_percent(interval=0.3) / 100)))


def use_idle_cores() -> None:
    """Have torch compute on no more cores of this process's machine than are idle now."""
    torch.set_num_threads(idle_cores())


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: of the GPU, or of the machine within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for folder, limit, used, files in _CGROUPS:
        try:
            most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
            told = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another version, or "max"
            continue
        free = min(free, most - taken + int(told.get(files, 0)))
    return max(free, 0)
