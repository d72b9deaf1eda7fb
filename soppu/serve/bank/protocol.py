"""What the admin routes need of a server: ours (`state`), or the vLLM plugin's (`vllm_plugin.control`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class LoadedAdapter(Protocol):
    """What a listing says about one PEFT adapter."""

    @property
    def content_hash(self) -> str:
        """Of its tensors."""
        ...

    @property
    def rank(self) -> int:
        """Its largest rank."""
        ...

    @property
    def verified(self) -> bool:
        """Whether it states this server's base hash."""
        ...


class Bank(Protocol):
    """What is loaded."""

    @property
    def active(self) -> str:
        """Id of the active bundle, "" if there is none."""
        ...

    def bundles(self) -> dict[str, tuple[str, ...]]:
        """Bundle id -> its users."""
        ...

    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """Name -> adapter."""
        ...


class Served(Protocol):
    """What may be changed. Methods block, and raise BundleError, AdapterError or StorageError."""

    @property
    def bank(self) -> Bank:
        """What is loaded."""
        ...

    @property
    def incoming(self) -> Path:
        """A folder for uploads under way."""
        ...

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool:
        """Stage a bundle file. False if it was there."""
        ...

    def activate(self, bundle_id: str) -> str:
        """Serve plain names from this bundle, "" from none; the one that was active."""
        ...

    def drop_bundle(self, bundle_id: str) -> None:
        """Forget a bundle."""
        ...

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder under a name, or replace the one of that name."""
        ...

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter."""
        ...
