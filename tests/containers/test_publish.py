"""Six users' models out of one run in two containers of our image: as adapters, and as a bundle."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

from soppu.adapter import read
from soppu.compress import Bundle
from soppu.errors import TargetError
from soppu.stages import federate
from soppu.stages.compress import compress_set
from soppu.stages.publish import publish
from soppu.stages.run import Run
from soppu.targets import container
from tests.containers.two import EVALUATION, run_of_two
from tests.docker_engine import ROOT
from tests.soppu.serve import tiny

pytestmark = pytest.mark.slow

USERS = tuple(f"user-{number}" for number in range(6))
PROMPT, TOKENS = "the quick", 8
PYTHON = ROOT / ".venv-lorax" / "bin" / "python"


class Served:
    """A run, its bundles, and where each form of them is served."""

    def __init__(self, folder: Path, base: Path, image: str) -> None:
        name = f"soppu-test-{os.getpid()}"
        self.run: Run = run_of_two(
            folder, base=base, image=image, rank=8, lorax_container=name, canary_prompt=PROMPT
        )
        self.urls = {one.label: one.url for one in self.run.config.serve.each()}
        self.names = [one.lorax_container for one in self.run.config.serve.each()]
        self.folder, self.volume = folder, folder / "volume"

    def bundle(self, *, version: int) -> str:
        """The id of a bundle of everybody's adapters of a version."""
        model, registry, base = tiny.llama(), self.run.registry(), self.run.base()
        for number, user in enumerate(USERS):
            made = tiny.lora(model, seed=10 * version + number)
            adapter = replace(made, base_model=base.name, base_hash=base.hash)
            registry.put_adapter(adapter, user=user)
        return compress_set(str(self.run.folder), federate.freeze_current(str(self.run.folder)))

    def publish(self, bundle_id: str, target: str) -> str:
        return publish(str(self.run.folder), bundle_id, EVALUATION, target)

    def asked_as(self, form: str) -> dict[str, str]:
        """User -> the id that asks for the user, as `soppu resolve` says it."""
        registry = self.run.registry()
        places = {user: registry.resolve(user) for user in USERS}
        return {
            user: next(one.asked_as for one in found if one.url == self.urls[form])
            for user, found in places.items()
        }


@pytest.fixture(scope="module")
def served(
    docker_engine: docker.DockerClient,
    soppu_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Everybody published in both forms, by a publication each."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    for part in (tiny.llama(), tokenizer):
        part.save_pretrained(folder / "tiny")
    for path in (folder / "tiny").iterdir():
        path.chmod(0o644)  # the server in the container is not who runs the tests
    made = Served(folder, folder / "tiny", soppu_image)
    try:
        first = made.bundle(version=1)
        for form in made.urls:
            made.publish(first, form)
        yield made
    finally:
        for name in made.names:
            docker_engine.containers.get(name).remove(force=True, v=True)


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, dict[str, str]]:
    """Form -> user -> what PEFT and generate say: of the folder in the volume, and of the bundle."""
    registry, model = served.run.registry(), tiny.llama()
    bundle = Bundle.load(registry.bundle_path(registry.live(served.urls["bundle"])))
    folders = served.asked_as("adapters")

    def text(adapter: Any) -> str:
        return tiny.peft_text(model, PROMPT, adapter, tokens=TOKENS)

    return {
        "adapters": {user: text(read(served.volume / folders[user])) for user in USERS},
        "bundle": {user: text(bundle.reconstruct(user)) for user in USERS},
    }


@pytest.mark.parametrize("form", ["adapters", "bundle"])
def test_the_lorax_client_gets_every_users_text_from_either(
    served: Served, expected: dict[str, dict[str, str]], form: str
) -> None:
    if not PYTHON.exists():
        pytest.fail("the LoRAX client is not installed; run: sh tests/lorax_env.sh")
    asked = served.asked_as(form)
    script = ROOT / "tests" / "soppu" / "serve" / "lorax_calls.py"
    command = [PYTHON, script, served.urls[form], PROMPT, *asked.values()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wanted = {asked[user]: text for user, text in expected[form].items()}
    assert told["generate"] == told["async"] == wanted
    assert len(set(wanted.values())) > len(USERS) // 2  # users answer differently
    for asked_as, (joined, whole) in told["stream"].items():
        assert joined == whole == wanted[asked_as]
    assert set(told["errors"]) >= {"generate", "stream", "validation"} and all(told["errors"].values())


@pytest.mark.parametrize("form", ["adapters", "bundle"])
def test_chat_and_completions_answer_by_the_same_ids(
    served: Served, expected: dict[str, dict[str, str]], form: str
) -> None:
    for user, asked_as in served.asked_as(form).items():
        body = {"model": asked_as, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        answer = requests.post(f"{served.urls[form]}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected[form][user]
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        answer = requests.post(f"{served.urls[form]}/v1/chat/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == expected[form][user]


def test_the_report_has_a_row_for_each_and_publishing_again_changes_nothing(served: Served) -> None:
    registry = served.run.registry()
    before = [one.id for one in registry.publications()]
    for form, url in served.urls.items():
        assert served.publish(registry.live(url), form) == url
    assert [one.id for one in registry.publications()] == before
    assert sorted(container.owned(served.folder / "serve")) == sorted(served.names)
    shared = list(served.volume.glob("adapters/*/*/shared.safetensors"))
    assert len(shared) == len(USERS) and len({path.stat().st_ino for path in shared}) == 1


@pytest.mark.long
def test_a_container_that_is_killed_comes_back_with_everybody(
    served: Served, docker_engine: docker.DockerClient
) -> None:
    for form, name in zip(served.urls, served.names, strict=True):
        container = docker_engine.containers.get(name)
        os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not answers(served.urls[form]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for asked_as in served.asked_as(form).values():
            body = {"inputs": PROMPT, "parameters": {"adapter_id": asked_as, "max_new_tokens": 1}}
            answer = requests.post(f"{served.urls[form]}/generate", json=body, timeout=60)
            assert answer.status_code == 200, answer.text


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    except requests.RequestException:
        return False


def test_a_second_version_is_switched_to_and_one_that_fails_is_not(served: Served) -> None:
    registry, url = served.run.registry(), served.urls["adapters"]
    first, second = registry.live(url), served.bundle(version=2)
    assert served.publish(second, "adapters") == url and registry.live(url) == second
    registry.forget(USERS[0])
    with pytest.raises(TargetError, match="forgotten"):
        served.publish(first, "adapters")
    assert registry.live(url) == second
