"""What the admin routes need of a server: ours (`state`), or the vLLM plugin's (`vllm_plugin.control`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class LoadedAdapter(Protocol):
    """What a listing says about one PEFT adapter."""

    @property
    def content_hash(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def verified(self) -> bool: ...


class Bank(Protocol):
    """What is loaded."""

    @property
    def active(self) -> str: ...

    def bundles(self) -> dict[str, tuple[str, ...]]: ...

    def adapters(self) -> Mapping[str, LoadedAdapter]: ...


class Served(Protocol):
    """What may be changed. Methods block, and raise BundleError, AdapterError or StorageError."""

    @property
    def bank(self) -> Bank: ...

    @property
    def incoming(self) -> Path: ...

    def add_bundle(self, source: Path, *, bundle_id: str) -> bool: ...

    def activate(self, bundle_id: str) -> str: ...

    def drop_bundle(self, bundle_id: str) -> None: ...

    def add_adapter(self, name: str, folder: Path) -> None: ...

    def drop_adapter(self, name: str) -> None: ...
