"""Held-out losses that are measured where the text is: on users' own nodes, on the emulator."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import soppu
from soppu import files
from soppu.evaluate.losses import CURRENT, EMULATOR, UserLosses
from soppu.federation import connection
from soppu.federation.personalise import BASE
from soppu.federation.simulation import EVALUATE
from soppu.stages import forms
from soppu.stages.federate import RESULT
from soppu.stages.run import FEDERATION, Run

WHERE = "on the emulator, on users' own nodes"
_log = logging.getLogger(__name__)


def measure(
    run: Run,
    members: Mapping[str, str],
    bundle_id: str,
    *,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> list[UserLosses]:
    """Ask the nodes of the run's connection; users whose node did not answer are left out, and logged.

    Args:
        members: user -> adapter id, everybody in the bundle.

    Raises:
        FederationError: the run on the connection did not come to an end.
    """
    settings, workdir = run.config.federation, run.folder / f"measured-{bundle_id[:16]}"
    result = run.read(RESULT)
    served = {**dict.fromkeys(members, CURRENT), **result.get("served", {})}
    trained = (run.folder / FEDERATION).resolve()
    order = {
        "bundle": bundle_id,
        "adapters": {**members, **result.get("adapters", {})},
        "compressed": [user for user in members if served[user] != BASE],
        "shared": str(trained / result["shared"]) if result else "",
        "federation": str(trained) if result else "",
    }
    files.write_text(workdir / "order.json", json.dumps(order))
    app = Path(soppu.__file__).resolve().parents[1]
    config = forms.main_part(run).path  # its settings name the checkpoint that has the emulator
    remote = connection.Remote(
        app, settings.connection, config, workdir, task=EVALUATE, timeout_s=settings.timeout_s
    )
    found = connection.run(remote, on_progress=on_progress)
    for user, why in found["refused"].items():
        _log.warning("not measured: %s: %s", user, why)
    return [_losses(user, one, served[user]) for user, one in sorted(found["losses"].items())]


def _losses(user: str, numbers: Mapping[str, Any], served: str) -> UserLosses:
    base = numbers["loss-base"]
    return UserLosses(
        user,
        int(numbers["num-examples"]),
        base,
        numbers["loss-personal"],
        numbers.get("loss-compressed", base),  # who is served the base model is not in the bundle
        shared=numbers.get("loss-shared"),
        served=served,
        measured_on=EMULATOR,
    )
