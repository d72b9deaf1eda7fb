"""Every error SOPPU raises on purpose, one tree below SoppuError.

Messages name the thing, the value found and the values allowed.
"""

from __future__ import annotations


class SoppuError(Exception):
    """Base of the tree: catch this to catch everything SOPPU raises on purpose."""

    exit_code = 1  # of a command that ends with it


class MissingExtra(SoppuError, ImportError):
    """What was asked for needs an optional package; the message says how to install it."""

    exit_code = 2

    def __init__(self, what: str, *, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'soppu[{extra}]'")


class ConfigError(SoppuError, ValueError):
    """A configuration is wrong; the message lists every fault found, not only the first."""


class DataError(SoppuError, ValueError):
    """User text cannot be read; the message names file and line."""


class UnsupportedModel(SoppuError, ValueError):
    """The decoder layers of this model cannot be located; the message lists what is supported."""


class ModelError(SoppuError):
    """A base model is absent, cannot be converted, or is not the one its hash names."""


class AdapterError(SoppuError, ValueError):
    """An adapter is malformed or belongs to another base model."""


class BundleError(SoppuError, ValueError):
    """A bundle file is malformed, or lacks what was asked of it."""


class RegistryError(SoppuError):
    """The registry does not hold what was asked for, or holds it damaged."""


class StorageError(RegistryError, OSError):
    """A write did not reach the disk; nothing that was there before has changed."""


class FederationError(SoppuError):
    """The federated run did not deliver what was asked of it."""


class SuperLinkAway(FederationError):
    """Nobody answers at the address of a connection; another try may find somebody there."""


class GateError(SoppuError):
    """The gate refused a bundle; `reasons` holds one line for each rule broken."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("not published: " + "; ".join(self.reasons))


class SandboxError(SoppuError):
    """This machine cannot run a program apart from everything else; it was not started."""


class NotThere(SoppuError):
    """There is no such user, adapter, bundle or run to be looked at."""


class ReportError(SoppuError, ValueError):
    """A report that cannot be read, or is not whole; the message names each field."""


class RouterError(SoppuError, ValueError):
    """A router's file is absent or damaged, or was made for another base model or bundle than is served."""


class TargetError(SoppuError):
    """A serving target could not be reached or did not pass its canaries."""


class PortTaken(TargetError):
    """Another process listens on the port; it is named, and nothing was started."""


class RequestError(SoppuError):
    """A request that cannot be answered. `status` and `error_type` follow LoRAX's API."""

    def __init__(self, message: str, *, status: int, error_type: str) -> None:
        self.status = status
        self.error_type = error_type
        super().__init__(message)
