"""Flow `soppu-join`: a new user of a fleet that is served. Its deployment is `join`."""

from __future__ import annotations

from typing import Any

from prefect import flow

from tasks.join import join as join_user
from tasks.recording import joining


@flow(name="soppu-join", log_prints=True)
def join(
    user: str, data: str, run: str = "runs/latest", own_rank: int = 0, target: str = ""
) -> dict[str, Any]:
    """Train one user inside the basis of a run's bundle, on the worker's machine, and serve them.

    Args:
        user: their id.
        data: file or folder of their text, on the worker's machine.
        run: folder of the run whose users are served.
        own_rank: rank of the user's own beside the core, 0 to 4.
        target: serving target of the run; "" is its first.
    """
    with joining(run, user, target=target):
        return join_user(run, user, data, own_rank, target)
