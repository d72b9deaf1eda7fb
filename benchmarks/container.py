"""Publishing to real containers: size, seconds, and what kill -9 leaves: benchmarks/results/container.json.

    python -m benchmarks.container [--users 50] [--moments 20] [--part push --part kills --part fuzz]

Needs a Docker engine (`make docker-up`) and our image (`make image`). Fifty users with synthetic adapters of
a small random model are published to one container as adapters and to another as a bundle. Then publications
to the first are ended by SIGKILL at random moments, the publisher and the container in turn; after
each, every user is asked for by the id that the registry gives, and has to answer as in one complete version.
At last schemathesis asks the container of the bundle. A part that is not run keeps its figures in the file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import docker
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.pages import read_result
from benchmarks.record import ROOT, circumstances, store
from benchmarks.schemathesis_run import Fuzz
from benchmarks.schemathesis_run import run as fuzz
from soppu import models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.serve import admin_token as tokens
from soppu.stages import federate
from soppu.stages.compress import compress_set
from soppu.stages.published import serving_file
from soppu.stages.run import Run
from soppu.stages.targets import lorax_target, target_settings
from soppu.targets.canary import Trace
from tests.containers.two import EVALUATION, run_of_two

RANK, LAYERS, HIDDEN = 4, 4, 64
PROMPT, TOKENS = "def main():", 6
PARTS = ("push", "kills", "fuzz")
REQUESTS, EXAMPLES = 5_000, 90  # of schemathesis, and of each operation in one go
SAME = 1e-3  # logprobs of one version, asked twice in other company
PUBLISH = "import sys; from soppu.stages.publish import publish; publish(*sys.argv[1:])"
Answers = dict[str, Trace]


@dataclass
class Place:
    """A run with two bundles of the same users, and two containers it publishes to."""

    run: Run
    bundles: tuple[str, str]

    def publisher(self, bundle_id: str, target: str) -> subprocess.Popen[bytes]:
        """A process that publishes."""
        words = [str(self.run.folder), bundle_id, EVALUATION, target]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", PUBLISH, *words], cwd=ROOT, **silent)  # type: ignore[call-overload,no-any-return]

    def publish(self, bundle_id: str, target: str) -> float:
        """Publish to the end; seconds."""
        started, process = time.monotonic(), self.publisher(bundle_id, target)
        _, said = process.communicate()
        if process.returncode:
            raise click.ClickException(said.decode(errors="replace")[-2000:])
        return time.monotonic() - started

    def ask(self) -> Answers:
        """What every user is answered by the id that the registry gives."""
        settings = target_settings(self.run, "adapters")
        target, registry = lorax_target(self.run, settings), self.run.registry()
        answers = {}
        for user, asked_as in registry.placements(settings.url).items():
            answer = target._read(target._patiently(PROMPT, asked_as, TOKENS))
            answers[user] = answer.trace if not answer.refusal else ()
        return answers


@click.command()
@click.option("--users", default=50, show_default=True)
@click.option("--moments", default=20, show_default=True)
@click.option("--image", default="soppu-server:latest", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, show_default=True)
def main(users: int, moments: int, image: str, seed: int, parts: tuple[str, ...]) -> None:
    """Measure all of it, or some parts, and write the result file."""
    values: dict[str, Any] = {**read_result("container"), "users": users, "image": image}
    with closing(docker.from_env()) as engine, tempfile.TemporaryDirectory() as folder:
        values["image_mb"] = round(engine.images.get(image).attrs["Size"] / 1e6, 1)
        place = prepared(Path(folder), image=image, users=users, seed=seed)
        try:
            times = measured(place)
            if "push" in parts:
                values["push_s"] = times
            if "kills" in parts:
                values |= killed(place, engine, moments=moments, seed=seed)
            if "fuzz" in parts:
                click.echo(f"asking the container of the bundle for {REQUESTS} odd things")
                values |= fuzzed(place)
        finally:
            for settings in place.run.config.serve.each():
                with suppress(docker.errors.NotFound):
                    engine.containers.get(settings.lorax_container).remove(force=True, v=True)
    packages = ("torch", "transformers", "docker", "schemathesis")
    click.echo(f"wrote {store('container', values | circumstances(seed=seed, packages=packages))}")
    click.echo(json.dumps({name: value for name, value in values.items() if name != "kills"}, indent=1))


def prepared(folder: Path, *, image: str, users: int, seed: int) -> Place:
    """A small random base model, two versions of every user, two bundles, and nothing published."""
    model_folder = folder / "tiny-random"
    packaged = models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")
    tokenizer = AutoTokenizer.from_pretrained(packaged.path, local_files_only=True)
    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    (model_folder / "model.safetensors").chmod(0o644)  # the container's server is not who runs this
    serve = {"lorax_container": "soppu-bench", "canary_prompt": PROMPT}
    run = run_of_two(folder, base=model_folder, image=image, rank=32, **serve)
    registry, bundles = run.registry(), []
    for version in range(2):
        for number in range(users):
            made = adapter(run, seed=1000 * version + number)
            registry.put_adapter(made, user=f"user-{number:03d}", run=f"version {version}")
        bundles.append(compress_set(str(run.folder), federate.freeze_current(str(run.folder))))
    return Place(run, (bundles[0], bundles[1]))


def adapter(run: Run, *, seed: int) -> LoraAdapter:
    """A user's adapter, strong enough that no two answer the same."""
    generator = torch.Generator().manual_seed(seed)
    shapes = models.linear_shapes(models.skeleton(run.base()))
    pairs = {
        name: LoraPair(
            torch.randn(RANK, i, generator=generator) / i**0.5, torch.randn(o, RANK, generator=generator) / 2
        )
        for name, (o, i) in shapes.items()
        if name.endswith(("q_proj", "v_proj"))
    }
    base = run.base()
    return LoraAdapter(pairs, base_model=base.name, base_hash=base.hash)


def measured(place: Place) -> dict[str, dict[str, float]]:
    """Seconds of publishing to each container: to one that starts, then another bundle to one that runs."""
    seconds: dict[str, dict[str, float]] = {}
    for form in ("adapters", "bundle"):
        cold = place.publish(place.bundles[0], form)
        whole = place.publish(place.bundles[1], form)
        told = place.run.read(serving_file(form))
        parts = {name: told[name] for name in ("push_s", "canaries_s")}
        seconds[form] = {"first_process_s": cold, "next_process_s": whole, **parts}
    return seconds


def killed(place: Place, engine: docker.DockerClient, *, moments: int, seed: int) -> dict[str, Any]:
    """End publications to the container of adapters at random moments, and look at what is served."""
    draw, settings = random.Random(seed), target_settings(place.run, "adapters")
    container = engine.containers.get(settings.lorax_container)
    target, registry = lorax_target(place.run, settings), place.run.registry()
    known: dict[str, Answers] = {}
    for bundle_id in place.bundles:
        last = place.publish(bundle_id, "adapters")
        known[bundle_id] = place.ask()
    rows, half = [], 0
    for number in tqdm(range(moments), desc="kills", unit="kill"):
        live = registry.live(settings.url)
        other = place.bundles[place.bundles.index(live) - 1]
        process, moment = place.publisher(other, "adapters"), draw.uniform(0.2, last)
        time.sleep(moment)
        if publisher := number % 2 == 0:
            process.kill()
        else:
            container.reload()
            os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
        process.wait()
        while not target.is_healthy():
            time.sleep(0.1)
        live = registry.live(settings.url)
        wrong = differing(place.ask(), known[live])
        half += bool(wrong)
        place.publish(other, "adapters")  # the next run completes
        wrong += differing(place.ask(), known[other])
        what = "publisher" if publisher else "container"
        rows.append({"killed": what, "at_s": round(moment, 2), "live_after": live[:12], "wrong": wrong})
    intact = all(registry.get_adapter(row.adapter_id) for row in registry.users())
    return {"kills": rows, "half_published": half, "registry_intact": intact}


def fuzzed(place: Place) -> dict[str, int]:
    """What schemathesis makes of the OpenAPI document of the container that holds the bundle."""
    settings = target_settings(place.run, "bundle")
    token = tokens.ensure(tokens.token_file(Path(settings.state)))
    asked = errors = 0
    while asked < REQUESTS:
        told = fuzz(Fuzz(settings.url, token, examples=EXAMPLES, seed=asked))
        asked, errors = asked + told["requests"], errors + told["server_errors"]
    return {"schemathesis_requests": asked, "server_errors": errors}


def differing(answers: Answers, known: Answers) -> int:
    """How many users were not answered as in this version; one who was not answered at all counts."""
    return sum(not _same(answers.get(user, ()), trace) for user, trace in known.items())


def _same(one: Trace, other: Trace) -> bool:
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) > 0 and all(a[0] == b[0] and abs(a[1] - b[1]) < SAME for a, b in pairs)


if __name__ == "__main__":
    main()
