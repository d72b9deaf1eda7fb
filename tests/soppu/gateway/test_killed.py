"""SIGKILL of publisher, gateway and server in the middle of a publication: who is answered, by what."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gateway import kills
from benchmarks.gateway_stack import stack


@pytest.mark.long
def test_every_answer_is_of_one_version_of_the_caller_s_own_adapter(tmp_path: Path) -> None:
    settings = {"log_users": "none", "limits": {"requests": "", "each_user": 64}}
    with stack(tmp_path, users=8, settings=settings) as made:
        found = kills(made, moments=3)
    assert made.gateway.running is not None and made.gateway.running.returncode == 0  # told to stop
    assert found["kills"].keys() == {"publisher", "gateway", "server"}
    assert found["distinct_texts"] == 16 and found["own"] == found["answered"] > 0
    assert found["wrong_user"] == found["wrong_version"] == found["unknown_text"] == 0, found["examples"]
