"""Blocking changes of what is served, off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

from soppu.errors import AdapterError, BundleError, RequestError, StorageError, TargetError

P = ParamSpec("P")
T = TypeVar("T")


async def changed(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking change off the event loop; what it refuses becomes a status."""
    try:
        return await run_in_threadpool(function, *args, **kwargs)
    except (BundleError, AdapterError) as error:
        kind = "bundle" if isinstance(error, BundleError) else "adapter"
        raise RequestError(str(error), status=422, error_type=kind) from error
    except (StorageError, TargetError) as error:
        raise RequestError(str(error), status=507, error_type="storage") from error
