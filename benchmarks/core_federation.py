"""Cores, from text to served tokens by one `prefect deployment run`: benchmarks/results/core_federation.json.

    python -m benchmarks.core_federation --part many [--users 1000]
    python -m benchmarks.core_federation --part demo [--way embedded] [--way float32] [--way vllm]

`many`: users of a random model of four layers, through the whole of the pipeline: the cohort's adapters, the
basis, everybody's cores, bundle, gate, server; and a tenth of them. Memory is what all processes of Prefect,
Flower, Ray and the server hold together (their own pages, and their share of what they have in common), every
two seconds.

`demo`: configs/basis.toml as it is; compressed in float32; and served by vLLM. It is trained once.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from transformers import LlamaForCausalLM

from benchmarks.federation_scale import Watch, places
from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from deploy.stack import Stack, down, up
from soppu.federation.simulation import free_port
from soppu.progress.events import DONE, FILE, Reader
from tests.flows.driver import Pipeline
from tests.soppu.serve import tiny

CONFIG = ROOT / "configs" / "basis.toml"
VLLM = "http://127.0.0.1:8101"
KEPT = ("served", "gain_kept")
# Enough for the machinery. What a random model learns says nothing, so the gate lets everything pass.
SMALL: dict[str, Any] = {
    "frozen_dtype": "float32",
    "data.users": [],
    "data.train_examples": 8,
    "data.min_examples": 4,
    "data.validation_examples": 2,
    "data.heldout_examples": 2,
    "data.max_tokens": 48,
    "plan.adapter_layers": 2,
    "align.warmup_steps": 4,
    "align.round_steps": 1,
    "align.examples": 8,
    "federation.cohort": 16,
    "federation.basis_rank": 8,
    "federation.basis_rounds": 4,
    "federation.basis_episode": 2,
    "federation.basis_steps": 2,
    "federation.together": 64,
    "federation.local_steps": 4,
    "federation.personal_steps": 8,
    "federation.personal_check_every": 4,
    "federation.timeout_s": 7200,
    "gate.min_mean_gain_kept": -10.0,
    "gate.min_user_gain_kept": -10.0,
    "gate.min_improved_users": 0.0,
    "gate.min_mean_gain_over_shared": -10.0,
    "gate.max_loss_over_shared": 10.0,
    "gate.max_relative_error": 10.0,
}


class Basis(Pipeline):
    """The pipeline with configs/basis.toml."""

    @property
    def parameters(self) -> dict[str, Any]:
        """As a user gives them."""
        return {"config": str(CONFIG), "overrides": self.overrides}


def texts(folder: Path, users: int) -> dict[str, Any]:
    """Users who each say some words of their own, a public text, and a base model: keys for a run of them."""
    (folder / "users").mkdir()
    for number in range(users):
        word = f"{number * 7919 % 10_007:05}"
        rows = [
            {"user_id": f"user{number:04}", "prompt": f"say {n}: ", "completion": f"{word} {n} " * 4}
            for n in range(20)
        ]
        path = folder / "users" / f"user{number:04}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    public = [{"user_id": "public", "prompt": f"say {n}: ", "completion": "anything"} for n in range(12)]
    (folder / "public.jsonl").write_text("\n".join(map(json.dumps, public)))
    config = tiny.llama().config
    config.num_hidden_layers = 4
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    sources = {"data.source": str(folder / "users"), "align.source": str(folder / "public.jsonl")}
    return {**sources, "base.model": str(folder / "base")}


def run_once(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """One run from the command to the served tokens: its report, its clock, and what it held."""
    mark = uuid.uuid4().hex
    os.environ["SOPPU_MEASURED"] = mark  # whatever is started from here on has it
    stack = Stack(f"http://127.0.0.1:{free_port()}/api", folder / "stack", folder / "serve")
    try:
        up(stack)
        pipeline = Basis(stack, folder, {**places(folder), **overrides})
        with Watch(mark) as watch:
            began, started = time.time(), time.monotonic()
            flow_run = pipeline.start("soppu/full-pipeline")
            ended = pipeline.wait(flow_run, timeout=4 * 3600)
            seconds = time.monotonic() - started
        if ended["state_type"] != "COMPLETED":
            raise click.ClickException(pipeline.logs(flow_run))
        run = (folder / "runs" / "latest").resolve()
        report = json.loads((run / "report.json").read_text())
        result = json.loads((run / "federation" / "result.json").read_text())
        return {
            "report": report,
            "result": result,
            "seconds": seconds,
            "stages": {stage["name"]: stage["seconds"] for stage in report["stages"]},
            "memory": held(watch, run, began),
        }
    finally:
        down(stack)


def held(watch: Watch, run: Path, began: float) -> dict[str, Any]:
    """Peak in all, peak of each stage, medians by quarter of the stage in which cores are trained."""
    ends = {
        event.stage: event for event in Reader(run / FILE).read() if event.state == DONE and event.seconds
    }
    peaks, quarters = {}, []
    for stage, event in ends.items():
        first = event.at - float(event.seconds or 0) - began
        within = [amount for at, amount in watch.seen if first <= at <= event.at - began]
        if within:
            peaks[stage] = max(within)
        if stage == "federate" and len(within) >= 4:
            part = len(within) // 4
            quarters = [statistics.median(within[at * part : (at + 1) * part]) for at in range(4)]
    return {
        "peak_bytes": max(amount for _, amount in watch.seen),
        "peak_bytes_by_stage": peaks,
        "median_bytes_by_quarter_of_cores": quarters,
    }


def wire(result: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of one reply, in medians: a LoRA in a shared round, gradients of a basis, a core at the end."""
    forms: dict[str, list[int]] = {}
    for log in result["rounds"]:
        for one in log["received"].values():
            of_core = log["mode"] == "personal" and one["form"] == "core"
            what = "core" if of_core else {"shared": "float32", "basis": "basis"}.get(log["mode"])
            if what:
                forms.setdefault(what, []).append(one["bytes_up"])
    found = {form: statistics.median(sizes) for form, sizes in forms.items()}
    told: dict[str, Any] = {"bytes_up_a_user": found}
    told["basis_rounds"] = sum(log["mode"] == "basis" for log in result["rounds"])
    if {"core", "float32"} <= found.keys():
        told["smaller"] = found["float32"] / found["core"]
    return told | {"bytes_basis": sum(log.get("bytes_basis", 0) for log in result["rounds"])}


def many(users: int) -> dict[str, Any]:
    """So many users of the random model."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        serve = {"serve.url": f"http://127.0.0.1:{free_port()}", "serve.completion_tokens": 4}
        done = run_once(folder, {**SMALL, **texts(folder, users), **serve})
    report, result = done["report"], done["result"]
    return {
        "users": users,
        "served": len(report["users"]),
        "cores": len(result["adapters"]),
        "minutes": done["seconds"] / 60,
        "seconds_by_stage": done["stages"],
        **done["memory"],
        **wire(result),
        "passed": report["gate"]["passed"],
        "canaries_ok": report["serving"]["canaries_ok"],
    }


def demo(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The demo of cores, or, where the folder has its training, what comes after that with other settings."""
    done = run_once(folder, {"serve.url": f"http://127.0.0.1:{free_port()}", **overrides})
    report, result = done["report"], done["result"]
    compression = report["compression"]
    return {
        "overrides": {key: value for key, value in overrides.items() if not key.endswith("python")},
        "minutes": done["seconds"] / 60,
        "seconds_by_stage": done["stages"],
        "peak_bytes": done["memory"]["peak_bytes"],
        "gains": report["gains"],
        "gate": report["gate"],
        "users": {
            row["id"]: {key: row[key] for key in row if key.startswith("loss_") or key in KEPT}
            for row in report["users"]
        },
        "bytes_before": compression["bytes_before"],
        "bytes_after": compression["bytes_after"],
        "method": compression["method"],
        "storage": compression["dtype"],
        **wire(result),
        "canaries_ok": report["serving"]["canaries_ok"],
    }


def ways(targets: Sequence[str], vllm_python: str) -> dict[str, dict[str, Any]]:
    """As it is, in float32, and at vLLM; all after one training."""
    vllm = {"serve.target": "vllm", "serve.url": VLLM, "serve.vllm_python": vllm_python}
    exact = {"compress.basis_bits": 32, "compress.core_bits": 32}
    known: dict[str, dict[str, Any]] = {"embedded": {}, "float32": exact, "vllm": vllm}
    return {name: known[name] for name in targets}


@click.command()
@click.option("--part", "parts", multiple=True, default=("many", "demo"))
@click.option("--users", default=1000, show_default=True)
@click.option("--way", "targets", multiple=True, default=("embedded", "float32"), help="vllm is one more.")
@click.option("--vllm-python", default=".venv-vllm/bin/python", show_default=True)
def main(parts: tuple[str, ...], users: int, targets: tuple[str, ...], vllm_python: str) -> None:
    """Measure the parts asked for, and keep the others as the file has them."""
    try:
        values: dict[str, Any] = dict(read_result("core_federation"))
    except FileNotFoundError:
        values = {}
    if "many" in parts:
        values["few"], values["many"] = many(users // 10), many(users)
        values["peak_ratio"] = values["many"]["peak_bytes"] / values["few"]["peak_bytes"]
    if "demo" in parts:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            for what, overrides in ways(targets, vllm_python).items():
                values[f"demo_{what}"] = demo(Path(name), overrides)
                click.echo(json.dumps(values[f"demo_{what}"]))
    packages = ("torch", "prefect", "flwr", "ray")
    click.echo(f"wrote {store('core_federation', {**values, **circumstances(seed=0, packages=packages)})}")


if __name__ == "__main__":
    main()
