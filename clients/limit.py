"""No message is worked on for longer than it lives: a client that hangs is ended, its place is free again."""

from __future__ import annotations

import faulthandler
import sys
import time

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from soppu.errors import FederationError


def within_its_time(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod. At the end of a message's life the process dies, with tracebacks of its threads in the log.

    No exception could do it: a hung call does not look for one. A simulated client counts from when the
    server wrote the message, since clients take turns here; a real one, whose clock is its own, from now.

    Raises:
        FederationError: the message is dead already.
    """
    left = message.metadata.ttl
    if "partition-id" in context.node_config:
        left += message.metadata.created_at - time.time()
    if left <= 0:
        raise FederationError("this message came too late: the round it belongs to is over")
    faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        return call_next(message, context)
    finally:
        faulthandler.cancel_dump_traceback_later()
