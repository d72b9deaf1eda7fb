"""What a machine makes up from the server's own document never breaks the server."""

from __future__ import annotations

from benchmarks.schemathesis_run import run_tiny


def test_made_up_requests_meet_no_server_error() -> None:
    made = run_tiny(examples=12, phases="fuzzing")
    assert made["requests"] >= 150
    assert made["server_errors"] == 0, made["bad"] or made["said"]
    assert made["statuses"].keys() >= {"200", "422"}
