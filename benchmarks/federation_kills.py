"""Runs of the pipeline in which something is killed: benchmarks/results/federation_kills.json.

    python -m benchmarks.federation_kills [--kills 20]

A real Prefect server, a real worker, a real `flwr run` of four users of a tiny random model. In each run
one thing gets SIGKILL at a random moment while users train: the simulation's SuperLink, a Ray actor, the
worker with all below it, the flow's process, or the Prefect server. Worker and server are started again, as
their supervisor would. Then the run has to complete by itself, or by the same command once more, with an
adapter of every user.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from deploy.stack import Stack, down, up
from soppu import models
from soppu.federation.simulation import free_port, mark_of
from soppu.registry import Registry
from tests.flows.driver import Pipeline, until

USERS = ("ann", "bob", "cleo", "dora")
KINDS = ("simulation", "actor", "worker", "flow process", "prefect server")
OUTAGE_S = 5.0
ROUNDS = 3


@dataclass(frozen=True)
class Kill:
    """What is killed in which run: so many seconds after this round of it began."""

    kind: str
    seed: int
    round: int
    after_s: float


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    """Kill, look, and write each run down; a second call goes on after the runs that the file has."""
    draw = random.Random(seed)
    planned = [_kill(number, draw) for number in range(kills)]
    rows = read_result("federation_kills").get("kills", [])
    written = keep(rows, seed)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        api = f"http://127.0.0.1:{free_port()}/api"
        stack = Stack(api=api, state=folder / "stack", serve_state=folder / "stack" / "serve")
        try:
            up(stack)
            pipeline = prepared(stack, folder)
            for kill in tqdm(planned[len(rows) :], desc="kills", unit="kill"):
                rows.append(survived(pipeline, kill))
                tqdm.write(json.dumps(rows[-1]))
                written = keep(rows, seed)
        finally:
            down(stack)
    click.echo(f"wrote {written}")


def _kill(number: int, draw: random.Random) -> Kill:
    moment = draw.randint(1, ROUNDS + 1), draw.uniform(0.0, 2.0)  # the last is the personal round
    return Kill(KINDS[number % len(KINDS)], 100 + number, *moment)


def keep(rows: list[dict[str, Any]], seed: int) -> Path:
    """Write what is known so far."""
    values = {
        "users": len(USERS),
        "kills": rows,
        "lost_users": sum(len(USERS) - row["users"] for row in rows),
        "by_itself": sum(row["by"] == "itself" for row in rows),
    }
    packages = ("torch", "prefect", "flwr", "ray")
    return store("federation_kills", values | circumstances(seed=seed, packages=packages))


def prepared(stack: Stack, folder: Path) -> Pipeline:
    """Four users' text, a small random model, and a gate that lets it pass."""
    packaged = models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")
    tokenizer = AutoTokenizer.from_pretrained(packaged.path, local_files_only=True)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(
        folder / "tiny"
    )
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "users").mkdir()
    for user in USERS:
        words = [f"word{number} of {user}" for number in range(20)]
        lines = [{"user_id": user, "prompt": f"say {word}: ", "completion": f"{word} " * 3} for word in words]
        (folder / "users" / f"{user}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = {
        "runs": str(folder / "runs"),
        "registry.root": str(folder / "registry"),
        "base.cache": str(ROOT / ".soppu" / "models"),
        "base.model": str(folder / "tiny"),
        "serve.state": str(folder / "stack" / "serve"),
        "serve.url": f"http://127.0.0.1:{free_port()}",
        "data.source": str(folder / "users"),
        "data.users": [],
        "align.examples": 16,
        "align.warmup_steps": 8,
        "federation.rounds": ROUNDS,
        "federation.patience": ROUNDS,
        "plan.adapter_layers": 2,
    }
    return Pipeline(stack, folder, overrides)


def survived(pipeline: Pipeline, kill: Kill) -> dict[str, Any]:
    """One run, something killed in it, and what became of it."""
    pipeline.overrides["seed"] = kill.seed  # a training of its own
    known = set(pipeline.folder.glob("runs/.federations/*"))
    flow_run = pipeline.submit("soppu/full-pipeline")

    def training() -> Path | None:
        for progress in pipeline.folder.glob("runs/.federations/*/progress.json"):
            note = json.loads(progress.read_text())["note"]
            if progress.parent not in known and f"round {kill.round} " in note:
                return progress.parent
        return None

    federation = until(training, timeout=300, every=0.05)
    time.sleep(kill.after_s)
    ended = struck(pipeline, kill, federation)
    if kill.kind in ("worker", "prefect server"):
        time.sleep(OUTAGE_S)
        up(pipeline.stack)
    by = "itself" if _completes(pipeline, flow_run, kill) else "same command"
    if by == "same command":
        pipeline.completed(pipeline.submit("soppu/full-pipeline"))
    result = json.loads((federation / "result.json").read_text())
    registry = Registry.open(pipeline.overrides["registry.root"])
    users = sum(bool(registry.get_adapter(held).pairs) for held in result["adapters"].values())
    return {
        "killed": kill.kind,
        "round": kill.round,
        "at_s": round(kill.after_s, 1),
        "ended": ended,
        "by": by,
        "users": users,
    }


def struck(pipeline: Pipeline, kill: Kill, federation: Path) -> int:
    """SIGKILL to what the kind says; how many processes that were."""
    mark = mark_of(federation)
    marked = [process for process in psutil.process_iter() if mark in _environment(process).values()]
    worker = psutil.Process(json.loads(pipeline.stack.pid_file("worker").read_text())["pid"])
    if kill.kind == "simulation":
        doomed = [one for one in marked if "flower-superlink" in " ".join(one.cmdline())]
    elif kill.kind == "actor":
        doomed = [one for one in marked if one.name().startswith("ray::")][:1]
    elif kill.kind == "worker":
        doomed = [worker, *worker.children(recursive=True)]
    elif kill.kind == "flow process":
        doomed = [one for one in worker.children() if "prefect" in " ".join(one.cmdline())]
    else:
        server = psutil.Process(json.loads(pipeline.stack.pid_file("prefect-server").read_text())["pid"])
        doomed = [server, *server.children(recursive=True)]
    for one in doomed:
        one.kill()
    psutil.wait_procs(doomed, timeout=10)
    return len(doomed)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def _completes(pipeline: Pipeline, flow_run: str, kill: Kill) -> bool:
    """Whether the run ends well by itself. One whose process or worker is gone never says that it ended."""
    alone = 60.0 if kill.kind in ("worker", "flow process") else 600.0
    try:
        return bool(pipeline.wait(flow_run, timeout=alone)["state_type"] == "COMPLETED")
    except AssertionError:
        return False


if __name__ == "__main__":
    main()
