"""What the admin routes change: one server's bundles and adapters, ours or the vLLM plugin's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from soppu.serve.bank.holdings import Holder


class Served(Protocol):
    """What may be changed, ours (`bank.store`) or the vLLM plugin's (`frontend.control`).

    Methods block, and raise BundleError, AdapterError or StorageError.
    """

    @property
    def bank(self) -> Holder[Any, Any]:
        """What is loaded."""

    @property
    def incoming(self) -> Path:
        """A folder for uploads under way."""

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Stage a bundle file. False if it was there."""

    @property
    def newcomers(self) -> Path:
        """A folder that outlasts restarts, for who joins here."""

    def bundle_path(self, bundle_id: str) -> Path:
        """The file of a loaded bundle."""

    def activate(self, bundle_id: str, *, instead_of: str | None = None) -> str:
        """Serve plain names from this bundle, "" from none; the one that was active.

        RequestError 409 where that is not `instead_of`, if given.
        """

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under a name, or replace the one of that name."""

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""
