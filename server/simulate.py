"""Flower's simulation with clients that come back: what `flwr-simulation` is in a run of ours.

Flower keeps a dead Ray actor in its pool and hands it message after message, all of which fail at once.
Here Ray starts such an actor anew, and gives it the message it died with once more.
"""

from __future__ import annotations

import ray
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.app import flwr_simulation
from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor


class Client(VirtualClientEngineActor):
    """Runs the ClientApp, message by message."""


def main() -> None:
    """Entry point: Flower's own, with another actor."""
    actor = ray.remote(max_restarts=-1, max_task_retries=1)(Client)
    setattr(raybackend, "ClientAppActor", actor)  # noqa: B010  # the name that Flower makes its actors by
    flwr_simulation()
