"""What each policy of a router gives up and costs, on the users of a run: benchmarks/results/router.json.

    soppu compress USER=ADAPTER... --out small.soppu --ratio 32
    python -m benchmarks.router runs/RUN --cheaper small.soppu

Quality is that of `soppu router fit`: nats a token of completions that nothing was trained on, the mean over
users, every prompt judged by policies that were fitted on other prompts. Regrets are to the oracle and to
always personal, with intervals that draw whole users, and others that draw prompts.

Seconds are those of the embedded engine in this process, one request at a time, no prompt shared with an
earlier one: every arm answers the same prompts with the same number of new tokens, in turns; the least of
the rounds counts. Deciding is timed with a server's own router, by policy, on the same prompts. `cost` of a
policy is its deciding and, by the shares in which it chooses them, its arms' seconds. The oracle decides in
no time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.record import circumstances, store
from soppu.compress import Bundle
from soppu.evaluate.intervals import interval
from soppu.models import dtype_name, load_model, load_tokenizer
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.engine.engine import Engine, EngineOptions
from soppu.serve.engine.generation import GenerationRequest
from soppu.serve.router import deciding, policies
from soppu.serve.router.deciding import RequestRouter, RouterOptions
from soppu.serve.router.file import RouterFile
from soppu.serve.router.measured import BASE, CHEAPER
from soppu.stages import router
from soppu.stages.router import FitOptions
from soppu.stages.router_measure import untrained
from soppu.stages.run import Run, open_run

Asked = Sequence[tuple[str, str]]  # (user, prompt)


@dataclass(frozen=True)
class Timing:
    """How much is timed."""

    prompts: int  # of a user
    rounds: int
    new_tokens: int


@dataclass(frozen=True)
class Seconds:
    """(n,) seconds of every timed prompt, by arm and by policy, and its tokens."""

    arms: Mapping[str, list[float]]
    deciding: Mapping[str, list[float]]
    prompt_tokens: list[int]


def engine_of(run: Run, found: RouterFile, cheaper: Path | None) -> tuple[Engine, Any]:
    """An engine that holds what the router chooses from, and its model."""
    base = run.base()
    model = load_model(base)
    bank = AdapterBank(model, base_hash=base.hash, base_model=base.name)
    bank.stage(Bundle.load(run.registry().bundle_path(found.bundle_id)), bundle_id=found.bundle_id)
    bank.activate(found.bundle_id)
    if cheaper:
        arm = next(arm for arm in found.options.arms if arm.name == CHEAPER)
        bank.stage(Bundle.load(cheaper), bundle_id=arm.adapter.partition("@")[2])
    options = EngineOptions(max_input_tokens=0, max_total_tokens=0, prefix_tokens=0, gather_seconds=0.0)
    return Engine(model, load_tokenizer(base), bank, options), model


def seconds(engine: Engine, routers: Mapping[str, RequestRouter], asked: Asked, timing: Timing) -> Seconds:
    """Every prompt with every arm and every policy, taking turns; the least of the rounds."""
    arms = next(iter(routers.values())).file.options.arms
    by_arm = {arm.name: [float("inf")] * len(asked) for arm in arms}
    by_policy = {name: [float("inf")] * len(asked) for name in routers}
    lengths = [0] * len(asked)
    for number in range(-1, timing.rounds):
        for place, (user, prompt) in enumerate(asked if number >= 0 else asked[:2]):
            for arm in np.roll(np.array(arms, dtype=object), place + number):
                taken, lengths[place] = answered(engine, prompt, arm.adapter_id(user), timing.new_tokens)
                by_arm[arm.name][place] = min(by_arm[arm.name][place], taken)
            for name, one in routers.items():
                decision = one.decide(GenerationRequest(prompt, user))
                if decision.policy != name:
                    raise click.ClickException(f"{user}: {name} did not decide: {decision.why}")
                by_policy[name][place] = min(by_policy[name][place], decision.seconds)
        if number < 0:  # what is made at the first forward is no request's
            for one in (*by_arm.values(), *by_policy.values()):
                one[:] = [float("inf")] * len(asked)
    return Seconds(by_arm, by_policy, lengths)


def answered(engine: Engine, prompt: str, adapter_id: str, new_tokens: int) -> tuple[float, int]:
    """Seconds of a request from its submission to its last token, and the tokens of its prompt."""
    request = GenerationRequest(prompt, adapter_id, max_new_tokens=new_tokens, ignore_eos=True)
    begun = time.perf_counter()
    finish = engine.submit(request).result()[1]
    if finish.generated_tokens != new_tokens:
        raise click.ClickException(f"{finish.generated_tokens} tokens came, not {new_tokens}")
    return time.perf_counter() - begun, finish.prompt_tokens


def with_costs(table: Sequence[Mapping[str, Any]], taken: Seconds) -> list[dict[str, Any]]:
    """The rows of a router's table with `cost` and `deciding`, seconds a request in the mean."""
    arms = {name: float(np.mean(one)) for name, one in taken.arms.items()}
    decided = {name: float(np.mean(one)) for name, one in taken.deciding.items()}
    return [
        {
            "policy": row["policy"],
            "quality": row["quality"],
            "cost": decided.get(row["policy"], 0.0)
            + sum(share * arms[name] for name, share in row["arms"].items()),
            **{name: value for name, value in row.items() if name not in ("policy", "quality")},
            "deciding": decided.get(row["policy"], 0.0),
        }
        for row in table
    ]


def arms_of(found: RouterFile, taken: Seconds, *, seed: int) -> list[dict[str, Any]]:
    """Every arm: bytes, seconds a request, and how many times the base model's, over the same prompts."""
    base = np.array(taken.arms[BASE])
    rows = []
    for arm in found.options.arms:
        own = np.array(taken.arms[arm.name])
        over = interval(own, base, seed=seed)
        told = {"arm": arm.name, "bytes": arm.bytes, "seconds": float(own.mean()), "to_base": over.mean}
        rows.append(told | {"interval_to_base": [over.low, over.high]})
    return rows


@click.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cheaper", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A third arm.")
@click.option("--prompts", default=32, show_default=True, help="Judged, of each user.")
@click.option("--timed", default=6, show_default=True, help="Of these timed, of each user.")
@click.option("--rounds", default=2, show_default=True, help="Of every arm on every timed prompt.")
@click.option("--new-tokens", default=24, show_default=True, help="Of every timed request.")
def main(run_dir: Path, cheaper: Path | None, prompts: int, timed: int, rounds: int, new_tokens: int) -> None:
    """Fit, judge, time, and write the result file."""
    run, timing = open_run(str(run_dir)), Timing(timed, rounds, new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path, begun = Path(folder) / router.FILE, time.perf_counter()
        options = FitOptions(prompts=prompts, cheaper=cheaper)
        found = router.fit(str(run_dir), path, options, on_progress=lambda told: click.echo(told["note"]))
        fitting = time.perf_counter() - begun
        taken = timed_on(run, found, (path, cheaper), timing)
    rows = with_costs(found.table, taken)
    for row in rows:
        click.echo(json.dumps({name: row[name] for name in ("policy", "quality", "cost", "interval")}))
    what = {
        "what": f"policies of a router on {len(found.measured)} prompts of {rows[0]['users']} users",
        "model": found.base_name,
        "bundle": told_of(run.registry().bundle_path(found.bundle_id)),
        "cheaper": told_of(cheaper) if cheaper else None,
        "dtype": {"judged": dtype_name(run.config.frozen_dtype), "timed": "float32"},
        "threads": torch.get_num_threads(),
        "judged": {"prompts_a_user": prompts, "folds": options.folds, "seconds": fitting},
        "policies": {"neighbours": found.options.neighbours, "tolerance": found.options.tolerance},
        "timed": {
            "prompts": len(taken.prompt_tokens),
            "prompt_tokens": float(np.mean(taken.prompt_tokens)),
            "new_tokens": new_tokens,
            "rounds": rounds,
        },
        "arms": arms_of(found, taken, seed=run.config.seed),
        "policy": found.policy,
        "why": found.why,
        "rows": rows,
        "seconds": {"arms": taken.arms, "deciding": taken.deciding},
    }
    click.echo(f"written: {store('router', circumstances(seed=run.config.seed) | what)}")


def timed_on(run: Run, found: RouterFile, paths: tuple[Path, Path | None], timing: Timing) -> Seconds:
    """Seconds of the first prompts of every user, on an engine with the router's file loaded by policy."""
    users = sorted(set(found.measured.asked.users))
    texts = untrained(run.config, users, prompts=timing.prompts)
    asked = [(user, item.prompt) for user in users for item in texts[user] if item.prompt]
    engine, model = engine_of(run, found, paths[1])
    names = policies.names([arm.name for arm in found.options.arms])
    with engine:
        routers = {}
        for name in names:
            options = RouterOptions(paths[0], mode="on", policy=name)
            made = deciding.opened(options, engine=engine, model=model)
            assert made is not None
            routers[name] = made
        click.echo(f"timing {len(asked)} prompts, {timing.rounds} rounds")
        return seconds(engine, routers, asked, timing)


def told_of(path: Path) -> dict[str, Any]:
    """Method and target of a bundle, its bytes, and the mean error of its users."""
    bundle, size = Bundle.load(path), path.stat().st_size
    errors = list(bundle.report.relative_error.values())
    told = {"method": bundle.report.method, "target": bundle.report.target, "bytes": size}
    return told | {"relative_error": float(np.mean(errors))}


if __name__ == "__main__":
    main()
