"""A port of this machine that is ours from before anything is loaded until the process ends."""

from __future__ import annotations

import os
import socket

from soppu.errors import ConfigError, PortTaken

_BACKLOG = 2048


def claim_port(host: str, port: int) -> socket.socket:
    """A socket that listens at `host:port`. PortTaken if somebody else has it.

    It listens at once, because two sockets that are only bound may share a port. Clients wait while the
    model loads.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error}") from None
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise PortTaken(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from None
