"""`soppu verify-target` of our own server and of vLLM, and the answers it holds theirs against."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu.adapter import write
from soppu.compress import Bundle
from soppu.errors import AdapterError
from soppu.targets.verify_reference import Reference
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble, double
from tests.soppu.targets.verified import PROMPT, base, bundle, failing, file, ids, verdicts

__all__ = ["base", "bundle", "double", "file", "ids"]
ADMIN = {"authorization": f"Bearer {tiny.TOKEN}"}


@pytest.mark.parametrize("staged", [False, True])
def test_our_own_server_passes_with_a_bundle(
    tmp_path: Path, bundle: Bundle, file: Path, base: Path, staged: bool
) -> None:
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        bundle_id = bundle.save(file)
        put = requests.put(
            f"{url}/soppu/v1/bundles/{bundle_id}", data=file.read_bytes(), headers=ADMIN, timeout=20
        )
        assert put.status_code == 201
        if not staged:
            requests.post(f"{url}/soppu/v1/bundles/{bundle_id}/activate", headers=ADMIN, timeout=20)
        found, details = verdicts(
            url, "--bundle", file, "--model", base, "--dangerous", "--token", tiny.TOKEN
        )
        assert failing(found) == set() and details["info"] == "embedded, tiny"
        for name in (
            "base",
            "answers",
            "header",
            "effect",
            "canary",
            "missing",
            "merges",
            "control",
            "paths",
        ):
            assert found[name] == "pass", (name, details[name])
        assert found["rank"] == "not applicable"


def test_who_was_not_answered_passes_no_point_of_an_answer(
    tmp_path: Path, bundle: Bundle, file: Path, base: Path, double: LoraxDouble, ids: dict[str, str]
) -> None:
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        found, details = verdicts(url, "--bundle", file, "--model", base)
    assert failing(found) == {"answers"}
    for name in ("header", "effect", "canary"):
        assert (found[name], details[name]) == ("not applicable", "no user was answered")
    shutil.rmtree(double.root / ids["user1"])
    found, details = verdicts(double.url, "--bundle", file, "--volume", double.root)
    assert found["header"] == "pass" and details["header"] == f"{len(bundle.users) - 1} users"


def test_our_own_server_fails_where_it_serves_somebody_else_s_numbers(
    tmp_path: Path, bundle: Bundle, base: Path
) -> None:
    for user in bundle.users:
        write(bundle.reconstruct(user), tmp_path / "folders" / user)
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        for user, folder in (("user1", "user1"), ("user2", "user1")):
            body = io.BytesIO()
            with tarfile.open(fileobj=body, mode="w") as archive:
                archive.add(tmp_path / "folders" / folder, arcname=".")
            put = requests.put(
                f"{url}/soppu/v1/adapters/{user}", data=body.getvalue(), headers=ADMIN, timeout=20
            )
            assert put.ok, put.text
        found, details = verdicts(url, "--adapters", tmp_path / "folders", "--model", base)
    assert failing(found) == {"answers", "canary"}
    assert details["canary"].startswith("user2: token") and details["answers"].startswith("user3: HTTP 424")


def test_a_bundle_without_effect_is_not_held_against_the_server(
    tmp_path: Path, bundle: Bundle, base: Path
) -> None:
    zero = {**vars(bundle), "norm": bundle.norm * torch.tensor([1.0, 0.0, 1.0]), "_last": {}}
    silent = Bundle(**{name: value for name, value in zero.items() if name[0] != "_"})
    bundle_id = silent.save(tmp_path / "zero")
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        data = (tmp_path / "zero").read_bytes()
        assert requests.put(f"{url}/soppu/v1/bundles/{bundle_id}", data=data, headers=ADMIN, timeout=20).ok
        found, _ = verdicts(url, "--bundle", tmp_path / "zero", "--model", base)
    assert failing(found) == set()


def test_the_reference_reads_the_server_s_own_tokens(bundle: Bundle, base: Path, tmp_path: Path) -> None:
    reference = Reference.load(str(base), cache=tmp_path)
    own = bundle.reconstruct("user1")
    model, ids = tiny.merged(tiny.llama(), own), tiny.tokenizer()(PROMPT)["input_ids"]
    trace = []
    for _ in range(4):
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
        trace.append((int(logprobs.argmax()), float(logprobs.max())))
        ids = [*ids, trace[-1][0]]

    def said(changed: list[tuple[int, float]], adapter: Any = own) -> str:
        return reference.fault(PROMPT, tuple(changed), adapter, tolerance=0.1)

    assert said(trace) == ""
    assert "token 1" in said(trace, None)
    assert said([*trace[:3], (trace[3][0], trace[3][1] - 0.2)]).startswith("token 4 has logprob")
    assert said([*trace[:2], (trace[2][0] + 1, trace[2][1])]).startswith(
        f"token 3 is {trace[2][0] + 1}, here"
    )
    assert said([(10_000, -1.0)]) == f"token 1 is 10000, the model has {len(logprobs)}"
    assert said([(trace[0][0], float("nan"))]) != "" and said([]) == "no tokens came back"
    with pytest.raises(AdapterError, match="the base model has no such module"):
        said(trace, tiny.lora(tiny.gpt2(), seed=1))


@pytest.fixture
def vllm(bundle: Bundle) -> Iterator[str]:
    """What vLLM's own API says of two adapters that were loaded into it; user3 was not."""
    held = {"tiny": None, **{user: bundle.reconstruct(user) for user in ("user1", "user2")}}

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": name, "parent": name != "tiny" and "tiny"} for name in held]})

    async def complete(request: Request) -> Response:
        asked = await request.json()
        if asked["model"] not in held:
            return JSONResponse({"error": {"message": "does not exist"}}, 404)
        model = tiny.merged(tiny.llama(), held[asked["model"]])
        ids = tiny.tokenizer()(asked["prompt"])["input_ids"]
        begin, told = len(ids), []
        for _ in range(asked["max_tokens"]):
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
            told.append(float(logprobs.max()))
            ids = [*ids, int(logprobs.argmax())]
        choice = {"text": "", "token_ids": ids[begin:], "logprobs": {"token_logprobs": told}}
        return JSONResponse({"model": asked["model"], "choices": [choice]})

    async def health(_: Request) -> Response:
        return Response()

    routes = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
    with tiny.listening(Starlette(routes=[*routes, Route("/health", health)])) as url:
        yield url


def test_a_vllm_is_tried_by_its_own_api(vllm: str, bundle: Bundle, base: Path, tmp_path: Path) -> None:
    for user in bundle.users:
        write(bundle.reconstruct(user), tmp_path / "folders" / user)
    asked = ("--adapters", tmp_path / "folders", "--model", base)
    found, details = verdicts(vllm, *asked, "--user", "user1", "--user", "user2", "--dangerous")
    assert failing(found) == set() and details["info"] == "vllm, tiny" and details["missing"] == "HTTP 404"
    assert {found[name] for name in ("answers", "header", "effect", "canary", "base")} == {"pass"}
    found, details = verdicts(vllm, *asked)
    assert failing(found) == {"answers"} and details["answers"].startswith("user3: HTTP 404")
