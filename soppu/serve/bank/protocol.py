"""What the admin routes need of a server: ours (`store`), or the vLLM plugin's (`frontend.control`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from soppu.serve.bank.holdings import Holder


class Served(Protocol):
    """What may be changed. Methods block, and raise BundleError, AdapterError or StorageError."""

    @property
    def bank(self) -> Holder[Any, Any]:
        """What is loaded."""

    @property
    def incoming(self) -> Path:
        """A folder for uploads under way."""

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Stage a bundle file. False if it was there."""

    def activate(self, bundle_id: str) -> str:
        """Serve plain names from this bundle, "" from none; the one that was active."""

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle."""

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under a name, or replace the one of that name."""

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""
