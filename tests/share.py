"""A remote root that is real: a folder behind an fsspec file system which is not the local one.

fsspec's memory:// is no stand-in where threads meet: all who read one of its files share one position in it.
"""

from __future__ import annotations

from pathlib import Path

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class ShareFileSystem(DirFileSystem):  # type: ignore[misc]
    """share:///tmp/x is the folder /tmp/x, as if it were mounted from far away."""

    protocol = "share"

    def __init__(self, **options: object) -> None:
        super().__init__(path="/", fs=LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("share://").lstrip("/")


def share(folder: Path) -> str:
    """The URL of a folder; fsspec knows the protocol from then on, in this process."""
    fsspec.register_implementation("share", ShareFileSystem)
    return f"share://{folder}"
