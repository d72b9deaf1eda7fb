"""Something that begins to listen just after a client was refused: what a race with a start looks like."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import requests

Ask = Callable[..., requests.Response]


@contextmanager
def latecomer(ask: Ask, port: int) -> Iterator[Ask]:
    """`ask`, after whose first call somebody listens on `port`, until the block ends."""
    with ExitStack() as open_sockets:

        def look(*args: Any, **options: Any) -> requests.Response:
            try:
                return ask(*args, **options)
            finally:
                open_sockets.enter_context(socket.create_server(("127.0.0.1", port)))

        yield look
