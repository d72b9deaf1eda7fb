"""Adapters that a request names by their place in one folder of the server, as LoRAX's source "local" does.

An id such as "adapters/alice/0f3c" is a folder below the root, and nothing outside of the root is ever read.
A folder that was read may not change: it is not looked at again. What is kept in memory: `bank.resident`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from soppu import adapter as adapters
from soppu.adapter import CONFIG_FILE, IDENTITY_FILE, SHARED_FILE, WEIGHTS_FILE, LoraAdapter
from soppu.errors import AdapterError
from soppu.serve.names import check_name
from soppu.serve.refusals import failed, invalid

_SHORTEST = 5  # LoRAX's
_FILES = (CONFIG_FILE, WEIGHTS_FILE, SHARED_FILE, IDENTITY_FILE)


def plain(name: str) -> str:
    """`name` as a path without "." and double slashes: one folder has one name. Looks at no disk.

    Raises:
        RequestError: 422 for control characters, an absolute path or one with "..", 424 for less than five
            characters.
    """
    check_name(name, what="adapter_id")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise invalid(f"`adapter_id` must be a path below the folder of adapters. Given: {name!r}")
    if len(name) < _SHORTEST or not path.parts:
        raise failed(f"model_id {name!r} is too short for prefix filtering")
    return str(path)


def read(root: Path, name: str) -> LoraAdapter:
    """The adapter in the folder `name` below `root`; messages name the folder as the request does.

    Raises:
        RequestError: 424: there is none, it is damaged or cannot be read, or it leads out of the root.
    """
    try:
        root = root.resolve(strict=True)
        folder = _inside(root, root / name, name)
        if not (folder / CONFIG_FILE).is_file():
            raise failed(f"No valid adapter config file found: tried {name}/{CONFIG_FILE}")
        if not (folder / WEIGHTS_FILE).is_file():
            raise failed(f"No local weights found in {name} with extension .safetensors")
        _check_files(root, folder, name)
        try:
            return adapters.read(folder)
        except AdapterError as error:
            raise failed(str(error).replace(str(folder), name)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise failed(f"No valid adapter config file found: tried {name}/{CONFIG_FILE}") from None
    except (
        OSError,
        RuntimeError,
    ) as error:  # no permission, a broken disk; links in a circle
        why = error.strerror if isinstance(error, OSError) else "links in a circle"
        raise failed(f"adapter {name!r} cannot be read: {why}") from None


def _check_files(root: Path, folder: Path, name: str) -> None:
    """Refuse files that lead out of the root, would block a reader, or would be read by LoRAX alone."""
    for path in folder.iterdir():
        if path.name in _FILES:
            if not path.is_file():
                raise failed(f"adapter {name!r}: {path.name} is no plain file, or a link to nothing")
            _inside(root, path, name)
        if path.suffix == ".safetensors" and path.name not in _FILES:
            raise failed(
                f"adapter {name!r}: expected no weights but {WEIGHTS_FILE} and {SHARED_FILE},"
                f" found {path.name}"
            )


def _inside(root: Path, path: Path, name: str) -> Path:
    """Where `path` is, links followed. RequestError 424 where that is outside of the root."""
    real = path.resolve(strict=True)
    if not real.is_relative_to(root):
        raise failed(f"adapter {name!r} leads out of the folder of adapters")
    return real
