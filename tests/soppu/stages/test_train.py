"""Centralised training of a run: the same adapter however it is distributed or stopped, and its losses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from peft import PeftModel

from soppu import adapter as adapters
from soppu import models
from soppu.adapter import LoraAdapter
from soppu.central.training import Schedule
from soppu.data import load_user, tokenize
from soppu.errors import AdapterError, ConfigError, DataError, UnsupportedModel
from soppu.federation.train import TrainOptions
from soppu.stages import train as stage
from soppu.stages.centralised import FILE, FOLDER, centralised_adapter
from soppu.stages.run import Run
from soppu.stages.train import Choices

ROOT = Path(__file__).parents[3]
SHORT = Schedule(TrainOptions(steps=8, batch_size=5, learning_rate=1e-2, b_ratio=2.0), check_every=2)
CHOICES = Choices(SHORT)


@pytest.fixture(autouse=True)
def _as_if_started_now() -> Iterator[None]:
    """Accelerate remembers how many processes there are; a fork would believe it too."""
    yield
    AcceleratorState._reset_state(True)


def train(run: Run, choices: Choices = CHOICES, **more: Any) -> dict[str, Any]:
    return stage.train(str(run.folder), choices, accelerator=Accelerator(cpu=True), **more)


def trained(run: Run, choices: Choices = CHOICES, **more: Any) -> LoraAdapter:
    train(run, choices, **more)
    found = centralised_adapter(run)
    assert found is not None
    return found


def distance(left: LoraAdapter, right: LoraAdapter) -> float:
    """Of the changes they make, relative to how large these are."""
    assert left.pairs.keys() == right.pairs.keys()
    apart = sum(float((p.delta() - right.pairs[n].delta()).norm() ** 2) for n, p in left.pairs.items())
    return (apart / sum(float(p.delta().norm() ** 2) for p in left.pairs.values())) ** 0.5


def loss_by_peft(run: Run, user: str) -> float:
    """Nats a token of a user's held-out text: transformers and peft by themselves, an example at a time."""
    model = PeftModel.from_pretrained(models.load_model(run.base()), str(run.folder / FOLDER))
    summed, tokens = 0.0, 0
    for block in tokenize(
        load_user(run.config.data, user).heldout, models.load_tokenizer(run.base()), max_tokens=48
    ):
        with torch.no_grad():
            mean = float(model(input_ids=block.ids[None], labels=block.labels[None]).loss)
        count = int((block.labels[1:] != -100).sum())
        summed, tokens = summed + mean * count, tokens + count
    return summed / tokens


def test_it_learns_on_everybodys_text_and_peft_finds_the_same_losses(run: Run) -> None:
    told = train(run)
    assert told == run.read(FILE) == train(run, on_progress=lambda _: pytest.fail("trained again"))
    assert told["losses"].keys() == {"ann", "bob", "cleo"}
    assert all(told["losses"][user] < told["base_losses"][user] for user in told["losses"])
    for user, loss in told["losses"].items():
        assert loss_by_peft(run, user) == pytest.approx(loss, abs=1e-4)
    looks = [loss for _, loss in told["validation"]]
    assert told["steps"] == told["validation"][looks.index(min(looks))][0]
    found = centralised_adapter(run)
    assert found is not None and found.base_hash == run.base().hash
    assert {name.split(".")[2] for name in found.pairs} == {"6", "7"}  # the run's adapter layers
    with pytest.raises(ConfigError, match=r"learning_rate = 0.01 \(asked for: 0.02\).*--again"):
        train(run, Choices(replace(SHORT, train=replace(SHORT.train, learning_rate=0.02))))
    run.write(FILE, {**told, "adapter_id": "a-0"})
    with pytest.raises(AdapterError, match="holds adapter a-.*says a-0"):
        centralised_adapter(run)


def in_two_processes(run: Run) -> None:
    stage.train(str(run.folder), CHOICES, accelerator=Accelerator(cpu=True))


def test_two_processes_come_to_the_adapter_of_one(run: Run) -> None:
    alone = trained(run)
    for name in (FOLDER, FILE):
        (run.folder / name).rename(run.folder / f"one-{name}")
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    debug_launcher(in_two_processes, (run,), num_processes=2)  # forked, over gloo
    assert run.read(FILE)["processes"] == 2
    both = centralised_adapter(run)
    assert both is not None and distance(alone, both) < 1e-3
    assert run.read(FILE)["losses"] == pytest.approx(run.read(f"one-{FILE}")["losses"], abs=1e-4)


@pytest.mark.long
def test_the_layers_below_give_the_same_whether_they_are_kept_or_run_again(run: Run) -> None:
    kept = trained(run)
    again = trained(run, Choices(SHORT, cache=False, again=True))
    assert distance(kept, again) < 1e-3
    aside = next(run.folder.glob("centralised-a-*.json"))  # nothing that was measured is lost
    assert (
        adapters.read(run.folder / json.loads(aside.read_text())["path"]).content_hash()
        == kept.content_hash()
    )


@pytest.mark.long
def test_all_layers_are_judged_by_the_same_measure(run: Run) -> None:
    told = train(run, Choices(SHORT, layers=-1))
    found = centralised_adapter(run)
    assert found is not None and {name.split(".")[2] for name in found.pairs} == set("01234567")
    assert loss_by_peft(run, "bob") == pytest.approx(told["losses"]["bob"], abs=1e-4)
    assert told["losses"]["bob"] < told["base_losses"]["bob"]


def test_what_was_stopped_goes_on_to_the_same_adapter(run: Run) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["note"].startswith("training: step 5,"):
            raise KeyboardInterrupt

    whole = trained(run)
    (run.folder / FILE).unlink()
    with pytest.raises(KeyboardInterrupt):
        train(run, on_progress=stop)
    assert centralised_adapter(run) is None and (run.folder / stage.CHECKPOINT).exists()
    steps: list[str] = []
    after = trained(run, on_progress=lambda event: steps.append(event["note"].split(",")[0]))
    assert steps[0] == "training: step 5"  # after the last look, of step 4
    assert after.content_hash() == whole.content_hash()
    assert not (run.folder / stage.CHECKPOINT).exists()


@pytest.mark.long
def test_a_checkpoint_of_other_choices_is_not_gone_on_with(run: Run) -> None:
    whole = trained(run)
    (run.folder / FILE).unlink()
    longer = Choices(replace(SHORT, train=replace(SHORT.train, seed=9)))

    def stop(event: dict[str, Any]) -> None:
        if event["note"].startswith("training: step 3,"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, longer, on_progress=stop)
    assert trained(run).content_hash() == whole.content_hash()


@pytest.mark.long
def test_it_ends_when_validation_stops_falling_and_keeps_the_best(run: Run) -> None:
    wild = Schedule(replace(SHORT.train, steps=40, learning_rate=0.3), check_every=1, patience=2)
    told = train(run, Choices(wild))
    assert told["steps_taken"] == told["steps"] + 2 < 40


def test_what_cannot_be_is_told(run: Run) -> None:
    with pytest.raises(UnsupportedModel, match="layers = 9, allowed: 1 to 8"):
        train(run, Choices(SHORT, layers=9))
    text = next(Path(run.config.data.source).iterdir())
    text.write_text(text.read_text().replace("says", "shouts"))
    with pytest.raises(DataError, match="has changed since this run was prepared"):
        train(run)


def test_text_on_nodes_is_not_looked_for_here(run: Run, reconfigured: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="federation.connection = 'ours': users' text is on nodes"):
        train(reconfigured(federation={"connection": "ours"}))


def test_deepspeeds_own_parser_takes_the_shipped_configuration() -> None:
    pytest.importorskip("deepspeed", reason="the extra `train` is not installed")
    from deepspeed.runtime.config import DeepSpeedConfig

    values = json.loads((ROOT / "configs" / "deepspeed_zero3_offload.json").read_text())
    found = DeepSpeedConfig({**values, "train_micro_batch_size_per_gpu": 2})  # which `soppu train` fills in
    assert found.zero_optimization_stage == 3
    assert {found.zero_config.offload_param.device, found.zero_config.offload_optimizer.device} == {"cpu"}


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_comes_to_the_adapter_of_a_plain_call(run: Run, processes: int) -> None:
    words = ["train", str(run.folder), "--steps", "8", "--batch", "5", "--learning-rate", "0.01"]
    words += ["--check-every", "2", "--device", "cpu"]
    launch = ["launch", "--config_file", "configs/accelerate.yaml", "--num_processes", str(processes)]
    command = [Path(sys.executable).parent / "accelerate", *launch, "-m", "soppu.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for said, line in ((done.stdout, "mean         base"), (done.stderr, "100% evaluating: cleo")):
        assert said.count(line) == 1  # by the first process alone
    assert run.read(FILE)["processes"] == processes
    launched = centralised_adapter(run)
    for name in (FOLDER, FILE):
        (run.folder / name).rename(run.folder / f"launched-{name}")
    assert launched is not None and distance(trained(run), launched) < 1e-3
