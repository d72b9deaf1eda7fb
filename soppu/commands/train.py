"""`soppu train`: the upper bound of a run, on one process or under `accelerate launch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator

from soppu import tables
from soppu.central.training import Schedule
from soppu.config import Config
from soppu.devices import torch_device
from soppu.federation.train import TrainOptions
from soppu.progress.bar import bar
from soppu.stages import train as stage
from soppu.stages.run import open_run

_STEP = click.FloatRange(min=0, min_open=True)
_COUNT = click.IntRange(min=1)


def _layers(context: click.Context, option: click.Parameter, value: str) -> int:
    if value in ("run", "all"):
        return {"run": 0, "all": -1}[value]
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r}, allowed: run, all, or a number of at least 1")
    return int(value)


@click.command("train")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--layers",
    default="run",
    show_default=True,
    callback=_layers,
    metavar="run|all|N",
    help="The last layers that carry the LoRA: as many as the run's adapters have, all, or N.",
)
@click.option("--steps", type=_COUNT, default=300, show_default=True, help="Optimiser steps, at most.")
@click.option(
    "--batch", type=_COUNT, default=8, show_default=True, help="Examples a step, over all processes."
)
@click.option(
    "--learning-rate", type=_STEP, default=None, help="AdamW's; default: the run's federation.learning_rate."
)
@click.option(
    "--check-every",
    type=_COUNT,
    default=10,
    show_default=True,
    help="Steps between two looks at validation text.",
)
@click.option(
    "--patience",
    type=_COUNT,
    default=3,
    show_default=True,
    help="Looks in a row without a better one that end it.",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Run the frozen layers below once for each example, and keep what they give.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--again", is_flag=True, help="Set another training aside, and train anew.")
def train_command(run_dir: Path, layers: int, device: str, cache: bool, again: bool, **how: Any) -> None:
    """Train one LoRA on the text of all users of RUN_DIR: the run's upper bound.

    The full model is trained, and nothing is federated. Text, its split, base model, rank and target modules
    are those of the run. Validation text picks the step, held-out text judges. Writes RUN_DIR/centralised, a
    PEFT folder, and centralised.json; an attempt that was stopped is gone on with. Several processes have the
    same batches, and come to the same adapter but for rounding:

    \b
      soppu train runs/demo-1234
      accelerate launch --config_file configs/accelerate.yaml --num_processes 2 \\
        -m soppu.cli train runs/demo-1234
    """  # noqa: D301
    run = open_run(str(run_dir))
    schedule = _schedule(run.config, **how)
    accelerator = _accelerator(device)
    choices = stage.Choices(schedule, layers=layers, cache=cache, again=again)
    with bar(shown=accelerator.is_main_process) as tell:
        told = stage.train(str(run_dir), choices, accelerator=accelerator, on_progress=tell)
    if told:
        _print(run_dir, told)
    accelerator.end_training()


def _schedule(
    config: Config, *, learning_rate: float | None, steps: int, batch: int, **looks: int
) -> Schedule:
    options = TrainOptions(
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate or config.federation.learning_rate,
        b_ratio=config.lora.alpha / config.lora.rank,
        seed=config.seed,
    )
    return Schedule(options, **looks)


def _accelerator(device: str) -> Accelerator:
    """As `accelerate launch` says in variables; DeepSpeed finds its own device, also where that is no GPU."""
    on_cpu = torch_device(device, key="--device").type == "cpu"
    return Accelerator(cpu=on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true")


def _print(run_dir: Path, told: dict[str, Any]) -> None:
    rows = [
        (user, f"{told['base_losses'][user]:.3f}", f"{loss:.3f}", f"{told['base_losses'][user] - loss:+.3f}")
        for user, loss in told["losses"].items()
    ]
    heads = ("USER", "BASE", "CENTRALISED", "GAIN")
    click.echo(tables.render(heads, rows, right=(1, 2, 3), width=tables.terminal_width()))
    means = [sum(told[key].values()) / len(told[key]) for key in ("base_losses", "losses")]
    click.echo(f"mean         base {means[0]:.3f}, centralised {means[1]:.3f} (held out, nats a token)")
    click.echo(f"step         {told['steps']} of {told['steps_taken']} taken, chosen on validation text")
    click.echo(f"adapter      {told['adapter_id']} in {run_dir / told['path']}")
