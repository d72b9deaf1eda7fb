"""What schemathesis makes of the server's own OpenAPI document: requests sent, and answers of 500 and above.

python -m benchmarks.schemathesis_run                                  # a tiny server of its own
python -m benchmarks.schemathesis_run --url URL --token-file FILE      # one that runs
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tests.soppu.serve import tiny

_PHASES = "examples,coverage,fuzzing,stateful"


@dataclass(frozen=True)
class Fuzz:
    """A server and how hard it is tried: examples of each route in each phase."""

    url: str
    token: str
    examples: int
    phases: str = _PHASES
    workers: int = 2
    seed: int = 1


def run(fuzz: Fuzz) -> dict[str, Any]:
    """Send what schemathesis makes up; how many requests, how many answers of each kind, and the bad ones.

    A 503 or 507 is counted too: a server that is neither stopping nor out of disk has no cause for one.
    """
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.ndjson"
        words = [sys.executable, "-m", "schemathesis.cli", "run", f"{fuzz.url}/api-doc/openapi.json"]
        words += ["--checks", "not_a_server_error", "--max-examples", str(fuzz.examples)]
        words += ["--phases", fuzz.phases, "--workers", str(fuzz.workers), "--seed", str(fuzz.seed)]
        words += ["--header", f"Authorization: Bearer {fuzz.token}", "--continue-on-failure", "--no-shrink"]
        words += ["--suppress-health-check", "all", "--report-ndjson-path", str(events), "--no-color"]
        words += ["--output-sanitize", "false", "--generation-database", "none", "--warnings", "off"]
        ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder)
        if not events.exists():
            raise click.ClickException(ended.stdout[-2000:] + ended.stderr[-2000:])
        with events.open() as lines:
            calls = [call for line in lines for call in _calls(json.loads(line))]
    statuses = Counter(status for _, status in calls)
    bad = sorted({f"{what}: {status}" for what, status in calls if status >= 500})
    return {
        "requests": len(calls),
        "server_errors": sum(count for status, count in statuses.items() if status >= 500),
        "statuses": {str(status): statuses[status] for status in sorted(statuses)},
        "bad": bad,
        "said": "" if not bad else ended.stdout[-6000:],
    }


def _calls(event: Any) -> list[tuple[str, int]]:
    """(method and URL, status) of every answer in an event, wherever it lies in it."""
    if isinstance(event, list):
        return [call for item in event for call in _calls(item)]
    if not isinstance(event, dict):
        return []
    response, request = event.get("response"), event.get("request")
    if isinstance(response, dict) and isinstance(request, dict) and "status_code" in response:
        return [(f"{request.get('method')} {request.get('uri', '')[:200]}", int(response["status_code"]))]
    return [call for item in event.values() for call in _calls(item)]


def run_tiny(*, examples: int, phases: str = _PHASES) -> dict[str, Any]:
    """`run` on a server of a tiny random model, in this process, with a bundle of two users."""
    model = tiny.llama()
    shared = tiny.bundle({user: tiny.lora(model, seed=seed) for seed, user in enumerate(("alice", "bob"), 1)})
    with tempfile.TemporaryDirectory() as folder:
        bundle_id = shared.save(Path(folder) / "bundle")
        with tiny.served(model, Path(folder) / "state", bundle=(Path(folder) / "bundle", bundle_id)) as url:
            return run(Fuzz(url, tiny.TOKEN, examples=examples, phases=phases))


@click.command()
@click.option("--url", default="", help="A server that runs; without one a tiny one is started.")
@click.option("--token-file", type=click.Path(exists=True, path_type=Path), help="Its admin token.")
@click.option("--examples", default=120, show_default=True, help="Of each route in each phase.")
def main(url: str, token_file: Path | None, examples: int) -> None:
    """Print the figures as JSON."""
    token = token_file.read_text().strip() if token_file else ""
    made = run(Fuzz(url, token, examples=examples)) if url else run_tiny(examples=examples)
    said = made.pop("said")
    print(json.dumps(made, indent=2))
    if made["server_errors"]:
        raise click.ClickException(said)


if __name__ == "__main__":
    main()
