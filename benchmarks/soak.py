"""Minutes of mixed load with bundle swaps in the middle: benchmarks/results/soak.json.

    make vllm && python -m benchmarks.soak [--minutes 10] [--kind mixed --kill --result soak_mixed]

vLLM with the plugin under the real `openai` client and the embedded server under the real `lorax-client`, at
once. Every user's adapter makes the model say one token over and over that no other user's makes it say, in
either version of the bundle: an answer tells whose it is, and of which version. Versions change every minute;
a request that began after a switch has to get the new one. Some requests are the base model's, some hang up.

With `--kill` all processes of vLLM get SIGKILL half-way, and the same command starts it again: nothing is
published, and what was live has to be. Requests from then until it is healthy are counted apart (`away`).
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import served
from benchmarks.mixed import mixed
from benchmarks.record import ROOT, circumstances, store
from benchmarks.serve import ADMIN_TOKEN, PYTHON, System, embedded, vllm
from benchmarks.soak_client import PROMPTS, TOKENS
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import Bundle, CompressOptions, compress
from soppu.targets import process
from soppu.targets.embedded import EmbeddedTarget
from soppu.targets.http import HttpTarget
from soppu.targets.vllm import VllmTarget

MODULE = "model.layers.29.mlp.down_proj"
LORAX = ROOT / ".venv-lorax" / "bin" / "python"
CLIENT = Path(__file__).with_name("soak_client.py")
_STRENGTH = 30_000.0  # beside which whatever else the layer has to say is nothing
_DRAWN = 256  # directions tried at a time
_MARGIN = 3.0  # between the logits of a voice and of the next best token
_LEAST = 2.0  # of that, at every token of an answer
_WARM_SHARE, _LAST_SHARE = 0.2, 0.8
_START = 900.0  # seconds for a start


@dataclass(frozen=True)
class Version:
    """One version of the bundle, and what each of its users says."""

    path: Path
    bundle_id: str
    says: Mapping[str, str]


@dataclass
class Subject:
    """A server under load: how it is told to swap, and which client asks it.

    `away` is from when to when it was gone, `kept` whether it came back with what was live.
    """

    name: str
    system: System
    target: HttpTarget
    client: tuple[str, ...]
    switches: list[tuple[float, str]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    away: tuple[float, float] = (0.0, 0.0)
    kept: bool = True


class Voices:
    """Directions of the last layer's output that make the model say one token, whatever was said before."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self._seen: set[int] = set()

    @functools.cached_property
    def driver(self) -> Tensor:
        """(1536,) what all inputs of the module have in common: the mean over prompts, of length one."""
        ids = [self._tokenizer(prompt).input_ids for prompt in PROMPTS]
        mean = torch.cat([self._states(given)[0] for given in ids]).mean(0)
        return mean / mean.norm()

    def _speaks(self, direction: Tensor, token: int) -> bool:
        """Whether the voice says its token, and nothing else by a margin, TOKENS times after any prompt.

        Nothing before the last layer is adapted, so the base model's states tell what the voice adds to.
        """
        for prompt in PROMPTS:
            given = self._tokenizer(prompt).input_ids
            x, h = self._states(given + [token] * (TOKENS - 1))
            loud = h + _STRENGTH * (x @ self.driver)[:, None] * direction
            with torch.inference_mode():
                best, chosen = self._model.lm_head(self._model.model.norm(loud[len(given) - 1 :])).topk(2)
            if not bool(((chosen[:, 0] == token) & (best[:, 0] - best[:, 1] > _LEAST)).all()):
                return False
        return True

    def _states(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tokens, 1536) the module's inputs, and (tokens, 576) what comes out of the last layer."""
        found: list[Tensor] = []
        places = (self._model.get_submodule(MODULE), self._model.model.norm)
        hooks = [one.register_forward_pre_hook(lambda _, given: found.append(given[0][0])) for one in places]
        with torch.inference_mode():
            self._model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        x, h = found
        return x.clone(), h.clone()

    def directions(self, count: int, generator: torch.Generator) -> list[tuple[Tensor, str]]:
        """`count` directions (576,) and the texts of TOKENS tokens they lead to, none of them known."""
        found: list[tuple[Tensor, str]] = []
        while len(found) < count:
            drawn = torch.randn(_DRAWN, self._model.config.hidden_size, generator=generator)
            drawn /= drawn.norm(dim=1, keepdim=True)
            with torch.inference_mode():
                best, chosen = self._model.lm_head(self._model.model.norm(drawn)).topk(2)
            for place in (best[:, 0] - best[:, 1] > _MARGIN).nonzero()[:, 0].tolist():
                token = int(chosen[place, 0])
                text = self._tokenizer.decode([token] * TOKENS)
                known = token in self._seen or not (text.isascii() and text.isalpha())
                if not known and self._speaks(drawn[place], token):
                    self._seen.add(token)
                    found.append((drawn[place].clone(), text))
        return found[:count]


def version(voices: Voices, folder: Path, *, users: int, seed: int, kind: str = "joint") -> Version:
    """A bundle in which every user has a voice of their own: by the joint method, or see `mixed`."""
    generator, base = torch.Generator().manual_seed(seed), served.base()
    driver, says, adapters = voices.driver, {}, {}
    for number, (direction, text) in enumerate(voices.directions(users, generator)):
        user = f"user{number:04d}"
        pair = LoraPair(A=driver[None].clone(), B=_STRENGTH * direction[:, None])
        adapters[user] = LoraAdapter({MODULE: pair}, base_model="smollm2-135m", base_hash=base.hash)
        says[user] = text
    if kind == "mixed":
        made: Bundle = mixed(adapters, rank=users)
    else:
        options = CompressOptions(method="joint", rank=users, basis_bits=32, core_bits=32, device="cpu")
        made = compress(adapters, options)
    path = folder / f"version-{seed}.soppu"
    return Version(path, made.save(path), says)


def run(subject: Subject, names: Iterable[str], folder: Path, *, seconds: float) -> Any:
    """Start the client; gives the process and the file it writes to."""
    users, out = folder / "users.json", folder / f"{subject.name}.jsonl"
    users.write_text(json.dumps(sorted(names)))
    command = [*subject.client, subject.system.endpoint.url, str(seconds), "8", str(users), str(out)]
    return subprocess.Popen(command), out


def swap(subject: Subject, new: Version, old: Version) -> None:
    """Bring the new version beside the old, switch, and let go of the old."""
    subject.target.publish(new.path, bundle_id=new.bundle_id)
    subject.target.activate(new.bundle_id)
    subject.switches.append((time.time(), new.bundle_id))
    time.sleep(5)
    subject.target.drop(old.bundle_id)


def kill(subject: Subject, folder: Path) -> None:
    """SIGKILL whatever is of the server, and start it again as it was."""
    family = psutil.Process(subject.system.pid)
    command, environment = family.cmdline(), family.environ()
    gone = time.time()
    for one in (family, *family.children(recursive=True)):
        one.kill()
    psutil.wait_procs([family], timeout=60)
    launch = process.Launch(command, folder / "again.log", folder / f"{subject.name}-again.pid", environment)
    pid = process.start(launch, ready=subject.target.is_up, timeout=_START)
    subject.system = replace(subject.system, pid=pid)
    subject.away = (gone, time.time())
    subject.kept = subject.target.active() == subject.switches[-1][1]
    subject.memory.clear()


def judged(subject: Subject, versions: Sequence[Version], out: Path) -> dict[str, Any]:
    """Failed requests, answers that are another user's, answers of a version that was gone."""
    every = [json.loads(line) for line in out.read_text().splitlines()]
    gone, back = subject.away
    lines = [line for line in every if line["ended"] < gone or line["began"] > back]
    says = {one.bundle_id: one.says for one in versions}
    failed = [line for line in lines if "error" in line]
    wrong, late = [], []
    for line in lines:
        if line["kind"] != "user" or "error" in line:
            continue
        spoken = [bundle_id for bundle_id, told in says.items() if told[line["user"]] == line["text"]]
        if not spoken:
            wrong.append(line)
        elif spoken[0] not in _allowed(subject.switches, line):
            late.append(line)
    began = max(lines[0]["began"], back)
    return {
        "requests": len(lines),
        "kinds": {kind: sum(line["kind"] == kind for line in lines) for kind in ("user", "base", "hang up")},
        "failed": len(failed),
        "wrong_user": len(wrong),
        "wrong_version": len(late),
        "examples": (failed + wrong + late)[:5],
        "swaps": len(subject.switches) - 1,
        "kills": int(back > 0),
        "away": {"seconds": back - gone, "requests": len(every) - len(lines)},
        "kept": subject.kept,
        "memory": _memory(subject.memory, began, lines[-1]["ended"]),
    }


def _allowed(switches: Sequence[tuple[float, str]], line: Mapping[str, Any]) -> set[str]:
    """The version that was active when the request began, and those switched to while it was under way."""
    before = [bundle_id for moment, bundle_id in switches if moment <= line["began"]]
    # the server has switched a moment before the switch is noted here
    during = [bundle_id for moment, bundle_id in switches if line["began"] < moment <= line["ended"] + 1.0]
    return {*before[-1:], *during}


def _memory(samples: Sequence[tuple[float, int]], began: float, ended: float) -> dict[str, float]:
    """Medians of the early and of the late minutes, once everything has been used once."""
    span = ended - began
    early = [size for at, size in samples if _WARM_SHARE * span < at - began < 0.4 * span]
    late = [size for at, size in samples if at - began > _LAST_SHARE * span]
    return {
        "early_bytes": statistics.median(early),
        "late_bytes": statistics.median(late),
        "growth": statistics.median(late) / statistics.median(early) - 1,
    }


def _subjects(stack: ExitStack, folder: Path, first: Version) -> list[Subject]:
    base = served.base()
    fleet = served.Served(base, Bundle.load(first.path), first.path, ())
    plugin = vllm(stack, folder, fleet, name="soppu")
    own = embedded(stack, folder, fleet)["embedded"]
    made = [
        Subject(
            "vllm",
            plugin,
            VllmTarget(plugin.endpoint.url, admin_token=ADMIN_TOKEN),
            (str(PYTHON), str(CLIENT), "openai"),
        ),
        Subject(
            "embedded",
            own,
            EmbeddedTarget(own.endpoint.url, admin_token=ADMIN_TOKEN),
            (str(LORAX), str(CLIENT), "lorax"),
        ),
    ]
    for subject in made:
        subject.switches.append((0.0, subject.target.active()))
    return made


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--users", default=64, show_default=True)
@click.option("--swaps", default=9, show_default=True)
@click.option("--kind", type=click.Choice(["joint", "mixed"]), default="joint", show_default=True)
@click.option("--kill", "kills", is_flag=True, help="vLLM, half-way.")
@click.option("--result", default="soak", show_default=True, help="Name of the result file.")
def main(minutes: float, users: int, swaps: int, kind: str, kills: bool, result: str) -> None:
    """Load, swap, judge, and write the result file."""
    seconds = 60 * minutes
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, voices = Path(name), Voices(served.base().path)
        versions = [version(voices, folder, users=users, seed=seed, kind=kind) for seed in (1, 2)]
        subjects = _subjects(stack, folder, versions[0])
        running = [run(one, versions[0].says, folder, seconds=seconds) for one in subjects]
        began, done = time.time(), 0
        while any(client.poll() is None for client, _ in running):
            for subject in subjects:
                subject.memory.append((time.time(), subject.system.memory()))
            if done < swaps and time.time() - began > (done + 1) * seconds / (swaps + 1):
                for subject in subjects:
                    swap(subject, versions[(done + 1) % 2], versions[done % 2])
                done += 1
            if kills and time.time() - began > seconds / 2:
                kill(subjects[0], folder)
                stack.callback(process.stop, folder / f"{subjects[0].name}-again.pid")
                kills = False
            time.sleep(2)
        results = {
            subject.name: judged(subject, versions, out)
            for subject, (_, out) in zip(subjects, running, strict=True)
        }
    made = circumstances(seed=0) | {
        "what": "mixed load with bundle swaps",
        "minutes": minutes,
        "users": users,
        "kind": kind,
    }
    click.echo(json.dumps(results, indent=1))
    click.echo(f"written: {store(result, made | results)}")


if __name__ == "__main__":
    main()
