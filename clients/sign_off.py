"""Tells a SuperLink that a SuperNode has ended: `python -m clients.sign_off`, after a node that was killed.

A SuperNode that ends by itself signs off. One that was killed cannot: for up to a minute the SuperLink takes
it to be there, waits for what it was doing, and lets nobody in with its key. Signed with that key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--superlink", required=True, help="HOST:PORT.")
@click.option("--root-certificates", type=_FILE, required=True, help="The CA of the SuperLink's certificate.")
@click.option("--auth-supernode-private-key", "key", type=_FILE, required=True, help="The node's key.")
@click.option("--node", type=int, required=True, help="What the SuperLink calls the node.")
def main(superlink: str, root_certificates: Path, key: Path, node: int) -> None:
    """Sign a node off whose process has ended."""
    private = load_ssh_private_key(key.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise click.BadParameter(f"{key}: holds a key of another kind; expected an elliptic curve's")
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    with FleetHttpClient.from_server_address(
        superlink, False, str(root_certificates), interceptors=interceptors
    ) as client:
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))


if __name__ == "__main__":
    main()
