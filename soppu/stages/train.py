"""Stage: the upper bound of a run, one LoRA trained on all its users' text on the full model, at one place.

Nothing of it is private, federated or personal, and nothing is served: it says what was there to be won.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers.integrations import unset_hf_deepspeed_config

from soppu import adapter as adapters
from soppu import files, models
from soppu.adapter import LoraAdapter
from soppu.central.bench import LEAST_BELOW, Bench, Place
from soppu.central.pooled import Sample
from soppu.central.training import CentralTraining, Schedule, State
from soppu.data import list_users, load_user, tokenize
from soppu.errors import ConfigError
from soppu.evaluate.losses import ExampleLosses
from soppu.module_names import lowest_layer
from soppu.progress.telling import Tell
from soppu.stages import text
from soppu.stages.bench import Bench as Gauge
from soppu.stages.bench import with_text
from soppu.stages.centralised import FILE, FOLDER, identify
from soppu.stages.run import Run, open_run

CHECKPOINT = ".centralised.pt"
LOCK = ".centralised.lock"
FORMAT = 1


@dataclass(frozen=True)
class Choices:
    """What is trained, and how far.

    Attributes:
        schedule: of the steps.
        layers: how many of the last layers carry the LoRA; 0 is the run's `plan.adapter_layers`, -1 is all.
        cache: whether the frozen layers below run once for each example, and not in every step. They run in
            every step all the same where DeepSpeed holds them, or fewer than two are below.
        again: set what is there aside, under another name, and train anew.
    """

    schedule: Schedule
    layers: int = 0
    cache: bool = True
    again: bool = False


def train(
    run_folder: str, choices: Choices, *, accelerator: Accelerator, on_progress: Tell | None = None
) -> dict[str, Any]:
    """Train, judge on held-out text, and write `FOLDER` and `FILE`; what is there already is only read.

    Every process of a launch calls it. An attempt that was interrupted goes on after its last look at the
    validation loss, but not under DeepSpeed. Returns what `FILE` holds; {} on processes but the first.

    Raises:
        ConfigError: users' text is on nodes of its own, `FILE` holds a training with other choices, somebody
            else is at it, or the choices do not fit the processes.
        UnsupportedModel: the choices do not fit the model.
        DataError: a user's text has changed since the run was prepared.
        AdapterError: the training came to no finite loss.
    """
    run = open_run(run_folder)
    text.check_here(run.config)
    text.check_unchanged(run.config.data, run.read(text.FILE))
    follows = _follows(run, choices, accelerator)
    first = accelerator.is_main_process
    if found := _found(run, follows, again=choices.again):
        return found if first else {}
    if not first:
        _train(run, choices, accelerator, follows=follows)
        return {}
    with _alone(run):
        _set_aside(run)
        started = time.perf_counter()
        adapter, state = _train(run, choices, accelerator, follows=follows, on_progress=on_progress)
        seconds = time.perf_counter() - started
        losses = _judged(run, adapter, on_progress)
        adapters.write(adapter, run.folder / FOLDER)
        told = {
            **_told(adapter, state, losses),
            "processes": accelerator.num_processes,
            "follows": follows,
            "environment": _environment(accelerator, seconds=seconds),
        }
        run.write(FILE, told)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    return told


def _follows(run: Run, choices: Choices, accelerator: Accelerator) -> dict[str, Any]:
    """What decides the adapter, but for rounding; the run folder fixes text, base model and LoRA."""
    options, total = choices.schedule.train, models.layer_count(run.base().path)
    layers = {0: run.config.plan.adapter_layers, -1: total}.get(choices.layers, choices.layers)
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    return {
        "layers": layers,
        "steps": options.steps,
        "batch": options.batch_size,
        "learning_rate": options.learning_rate,
        "b_ratio": options.b_ratio,
        "seed": options.seed,
        "check_every": choices.schedule.check_every,
        "patience": choices.schedule.patience,
        "cached": choices.cache and not sharded and layers <= total - LEAST_BELOW,
        "mixed_precision": accelerator.mixed_precision,
    }


def _found(run: Run, follows: dict[str, Any], *, again: bool) -> dict[str, Any]:
    """The training that is there, if it followed from the same; {} if there is none, or another `again`."""
    told = run.read(FILE)
    if not told or told["follows"] == follows:
        return told
    if not again:
        differing = ", ".join(
            f"{key} = {told['follows'].get(key)} (asked for: {value})"
            for key, value in follows.items()
            if told["follows"].get(key) != value
        )
        raise ConfigError(
            f"{run.folder / FILE}: holds a training with {differing}; --again sets it aside and trains anew"
        )
    return {}


def _set_aside(run: Run) -> None:
    """Rename a training that another takes the place of: nothing that was measured is lost."""
    if told := run.read(FILE):
        aside = f"centralised-{told['adapter_id']}"
        (run.folder / FOLDER).rename(run.folder / aside)
        run.write(f"{aside}.json", {**told, "path": aside})
        (run.folder / FILE).unlink()


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(files.exclusive(run.folder / LOCK, wait=False))
        except BlockingIOError:
            raise ConfigError(f"{run.folder}: another `soppu train` is at it; wait for its end") from None
        yield


def _train(
    run: Run,
    choices: Choices,
    accelerator: Accelerator,
    *,
    follows: dict[str, Any],
    on_progress: Tell | None = None,
) -> tuple[LoraAdapter, State]:
    """The adapter, and how it was made; alike on every process."""
    unset_hf_deepspeed_config()  # else transformers cuts weights as it reads them, whose shapes we look at
    bench = _bench(run, layers=follows["layers"], cached=follows["cached"])
    training = CentralTraining(
        accelerator, bench.pooled, _samples(run, bench, accelerator), schedule=choices.schedule
    )
    checkpoint = None if training.sharded else run.folder / CHECKPOINT
    state = training.fit(checkpoint, follows=json.dumps(follows), on_progress=on_progress)
    return bench.adapter(state.best, base_model=run.config.base.model), state


def _bench(run: Run, *, layers: int, cached: bool) -> Bench:
    base, config = run.base(), run.config
    model = models.load_model(base, dtype=config.frozen_dtype)
    if not cached:  # with a LoRA in it there is no part that only stands still
        model = model.to(models.computing(config.compute_dtype, config.frozen_dtype))
    place = Place(layers, config.lora.rank, config.lora.target_modules, cached=cached)
    return Bench(model, base.hash, place, seed=config.seed)


def _samples(run: Run, bench: Bench, accelerator: Accelerator) -> tuple[list[Sample], list[Sample]]:
    """Everybody's text to train on, and to choose the step with."""
    data, tokenizer = run.config.data, models.load_tokenizer(run.base())
    texts = [load_user(data, user) for user in list_users(data)]
    parts = []
    for examples in ([t.train for t in texts], [t.validation for t in texts]):
        blocks = tokenize(
            itertools.chain(*examples),
            tokenizer,
            max_tokens=data.max_tokens,
            chat_template=data.chat_template,
        )
        parts.append(bench.samples(blocks, pad_id=tokenizer.pad_token_id, accelerator=accelerator))
    return parts[0], parts[1]


def _judged(run: Run, adapter: LoraAdapter, on_progress: Tell | None) -> dict[str, ExampleLosses]:
    """User -> the losses of their held-out text, columns "base" and "adapter", as the gate measures them."""
    gauge = Gauge(run, layers=max(lowest_layer(adapter.pairs), LEAST_BELOW))  # no cut is lower
    here = with_text(run.config, list_users(run.config.data))
    found = {}
    for number, (user, own) in enumerate(here.items(), start=1):
        found[user] = gauge.measure(own.heldout, {"base": None, "adapter": adapter})
        if on_progress:
            on_progress({"note": f"evaluating: {user}", "share": number / len(here)})
    return found


def _told(adapter: LoraAdapter, state: State, losses: Mapping[str, ExampleLosses]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "path": FOLDER,
        "adapter_id": identify(adapter),
        "steps": state.best_step,
        "steps_taken": state.step,
        "validation": [list(look) for look in state.looks],  # step, loss
        "losses": {user: each.mean("adapter") for user, each in losses.items()},
        "base_losses": {user: each.mean("base") for user, each in losses.items()},
        "tokens": {user: sum(each.tokens) for user, each in losses.items()},
    }


def _environment(accelerator: Accelerator, *, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 1),
        "distributed": accelerator.distributed_type.value,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }
