"""A new user, from their text to their first token, part by part: benchmarks/results/join.json.

    python -m benchmarks.join RUN_DIR [--folder PLACE --prepare]

A run of `make demo`, and its registry, are copied. Its set is compressed anew by the joint method, k = 32,
judged and published to an embedded server that is started for it. Then a user of the built-in corpus whom
the run has not seen joins by `soppu join`, in a process of its own as a person would start it; and a
second one while the server is under the load of `soak_client`. Every answer to everybody else is held
against what they said before. With `--prepare` only the fleet is made, in PLACE, and its server left running:
what is measured afterwards takes some minutes of a quiet machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.record import ROOT, circumstances, store
from benchmarks.soak_client import PROMPTS
from soppu import config as configuration
from soppu import files
from soppu.compress import Bundle
from soppu.federation.simulation import free_port
from soppu.stages.compress import compress_set
from soppu.stages.evaluate import evaluate
from soppu.stages.publish import publish
from soppu.stages.run import CONFIG, Run, open_run
from soppu.stages.targets import open_target
from soppu.targets import process
from soppu.targets.http import request

K, SEED = 32, 0
LORAX = ROOT / ".venv-lorax" / "bin" / "python"
CLIENT = Path(__file__).with_name("soak_client.py")
WORKERS = 4
TOKENS = 24  # of an answer: after fewer most users still say the same
_AFTER_S = 10.0  # of load, once the join is done


@dataclass(frozen=True)
class Fleet:
    """The copied run, whose users are served."""

    run: Run
    users: Sequence[str]

    @property
    def url(self) -> str:
        """Of the server that was started for it."""
        return self.run.config.serve.url


def copied(source: Path, folder: Path) -> Run:
    """The run and its registry in another folder, with a server of its own and the joint method."""
    run = open_run(str(source))
    shutil.copytree(source, folder / "runs" / source.name)
    shutil.copytree(run.config.registry.root, folder / "registry")
    config = configuration.load(
        source / CONFIG,
        {
            "runs": str(folder / "runs"),
            "registry.root": str(folder / "registry"),
            "serve.url": f"http://127.0.0.1:{free_port()}",
            "serve.state": str(folder / "serve"),
            "compress.method": "joint",
            "compress.rank": K,
            "compress.ratio": 0.0,
            "data.users": run.config.data.users[:1],  # of the others nothing is measured to publish this
            # of this bundle alone: that eight users share k = 32 is not what is measured here
            "gate.min_mean_gain_kept": 0.0,
            "gate.min_user_gain_kept": -10.0,
            "gate.min_improved_users": 0.0,
            "gate.max_relative_error": 1.0,
        },
    )
    files.write_text(folder / "runs" / source.name / CONFIG, configuration.dump(config))
    return open_run(str(folder / "runs" / source.name))


def served(run: Run) -> Fleet:
    """Compress the run's set, judge it, publish it."""
    set_id = run.read(run.newest_evaluation())["set_id"]
    bundle_id = compress_set(str(run.folder), set_id)
    publish(str(run.folder), bundle_id, evaluate(str(run.folder), set_id, bundle_id))
    return of_live(run)


def of_live(run: Run) -> Fleet:
    """Who is served now, by a server that answers."""
    live = open_target(run).active()
    return Fleet(run, Bundle.load(run.registry().bundle_path(live)).users)


def joined(fleet: Fleet, user: str) -> dict[str, Any]:
    """`soppu join` in a process of its own; seconds of its parts, and of all of it as the caller waits."""
    command = [sys.executable, "-m", "soppu.cli", "join", user, "--data", "stdlib", "--run"]
    started = time.perf_counter()
    done = subprocess.run([*command, str(fleet.run.folder)], capture_output=True, text=True, check=False)
    whole = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(done.stdout + done.stderr)
    (told,) = (json.loads(path.read_text()) for path in fleet.run.folder.glob(f"join-{user}-*.json"))
    parts = {f"{part.replace(' ', '_')}_s": round(took, 2) for part, took in told["seconds"].items()}
    start = whole - sum(told["seconds"].values())
    (losses,) = told["losses"]
    return {
        "user": user,
        "total_s": round(whole, 2),
        "start_and_end_of_the_command_s": round(start, 2),
        **parts,
        "steps": told["steps"],
        "numbers": told["numbers"],
        "row_bytes": told["added"],
        "losses": {name: round(losses[name], 4) for name in ("base", "shared", "personal", "compressed")},
    }


def said(fleet: Fleet) -> dict[tuple[str, str], str]:
    """What everybody says after every prompt, one at a time; "" is the base model."""
    found = {}
    for user in ("", *fleet.users):
        for prompt in PROMPTS:
            parameters = {"max_new_tokens": TOKENS, "ignore_eos_token": True, "adapter_id": user or None}
            asked = {"inputs": prompt, "parameters": parameters}
            answer = request("POST", f"{fleet.url}/generate", json=asked, timeout=(5.0, 120.0))
            found[user, prompt] = answer.json()["generated_text"]
    return found


def under_load(fleet: Fleet, user: str, folder: Path) -> dict[str, Any]:
    """A join while clients ask; what became of their requests."""
    says = said(fleet)
    users, out, stop = folder / "users.json", folder / "load.jsonl", folder / "stop"
    users.write_text(json.dumps(list(fleet.users)))
    words = [
        str(LORAX),
        str(CLIENT),
        "lorax",
        fleet.url,
        "600",
        str(WORKERS),
        str(users),
        str(out),
        str(stop),
    ]
    load = subprocess.Popen(words, env={**os.environ, "SOAK_TOKENS": str(TOKENS)})
    time.sleep(_AFTER_S)
    began = time.time()
    told = joined(fleet, user)
    ended = time.time()
    time.sleep(_AFTER_S)
    stop.touch()
    load.wait(120)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return told | _judged(lines, says) | {"load": _latency(lines, began, ended), "clients": WORKERS}


def _judged(lines: Sequence[Mapping[str, Any]], says: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Requests that failed, and answers that are not what their user had said, another's among them."""
    asked = [line for line in lines if line["kind"] != "hang up" and "error" not in line]
    other = [line for line in asked if says[line["user"], line["prompt"]] != line["text"]]
    wrong = [
        line
        for line in other
        if any(
            text == line["text"] and prompt == line["prompt"] and user != line["user"]
            for (user, prompt), text in says.items()
        )
    ]
    alike = {key for key, text in says.items() if [*says.values()].count(text) > 1}
    return {
        "requests": len(lines),
        "failed": sum("error" in line for line in lines),
        "wrong_user": len(wrong),
        "not_as_before": len(other),
        "answers_that_tell_their_user": round(1 - len(alike) / len(says), 3),
        "examples": other[:3],
    }


def _latency(lines: Sequence[Mapping[str, Any]], began: float, ended: float) -> dict[str, Any]:
    """Seconds an answer took before and while the user joined, median and the longest."""
    found = {}
    for name, inside in (("before", lambda at: at < began), ("meanwhile", lambda at: began <= at <= ended)):
        took = sorted(line["ended"] - line["began"] for line in lines if inside(line["began"]))
        found |= {f"{name}_median_s": round(took[len(took) // 2], 3), f"{name}_longest_s": round(took[-1], 3)}
    return found


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True))
@click.option("--user", "users", multiple=True, default=("wsgiref", "json"), help="Two, whom the run lacks.")
@click.option("--folder", "place", type=click.Path(path_type=Path), help="Where the fleet is, or is made.")
@click.option("--prepare", is_flag=True, help="Make the fleet in --folder, and measure nothing.")
def main(run_dir: Path, users: tuple[str, str], place: Path | None, prepare: bool) -> None:
    """Copy, serve, join twice, and write the result file."""
    with tempfile.TemporaryDirectory() as name:
        folder = place or Path(name)
        made_before = (folder / "runs" / run_dir.name).exists()
        run = open_run(str(folder / "runs" / run_dir.name)) if made_before else copied(run_dir, folder)
        try:
            fleet = of_live(run) if made_before else served(run)
            if prepare:
                return
            alone = joined(fleet, users[0])
            loaded = under_load(fleet, users[1], folder)
            users_now = len(Bundle.load(run.registry().bundle_path(open_target(run).active())).users)
        finally:
            if not prepare:
                process.stop(folder / "serve" / "server.pid")
    made = {
        "what": "soppu join, from a person's command to the first token of the new user",
        "fleet": {"users": len(fleet.users), "method": "joint", "k": K, "users_afterwards": users_now},
        **{key: value for key, value in alone.items() if key.endswith("_s")},
        "alone": alone,
        "under_load": loaded,
        **circumstances(seed=SEED),
    }
    click.echo(json.dumps(made, indent=1))
    click.echo(f"written: {store('join', made)}")


if __name__ == "__main__":
    main()
