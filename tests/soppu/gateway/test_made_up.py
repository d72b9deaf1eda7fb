"""What a machine makes up from the gateway's own document never breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.schemathesis_run import Fuzz, run
from tests.soppu.gateway.house import house
from tests.soppu.gateway.test_sockets import listening

PHASES = "examples,coverage,fuzzing"


@pytest.mark.long
def test_made_up_requests_meet_no_server_error(tmp_path: Path) -> None:
    limits = {"requests": "", "each_user": 64}
    with house(tmp_path, limits=limits) as one, listening(one) as (host, port, _):
        made = run(Fuzz(f"http://{host}:{port}", one.keys["alice"], examples=40, phases=PHASES))
    assert made["requests"] >= 500
    assert made["server_errors"] == 0, made["bad"] or made["said"]
    assert made["statuses"].keys() >= {"200", "403", "422"}
