"""What a flow does while Prefect's server is away: it waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import httpx

_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, *[15.0] * 40)  # ten minutes in all, as PREFECT_CLIENT_MAX_RETRIES in deploy/


def outlasting(subflow: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a subflow; as long as the server cannot be reached, wait and call it again.

    Prefect itself waits for a server that it has spoken to, and calls of tasks need no more. For a subflow it
    makes a new connection, which it tries once.

    Raises:
        httpx.ConnectError: the server did not come back.
    """
    for pause in _PAUSES_S:
        try:
            return subflow(*args, **kwargs)
        except httpx.ConnectError as error:
            _log.warning("Prefect's server is away (%s): trying again in %.0f s", error, pause)
            time.sleep(pause)
    return subflow(*args, **kwargs)
