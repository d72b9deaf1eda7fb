"""`soppu verify-target`: a good server passes every point, and each thing that goes wrong fails its own."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu.adapter import write
from soppu.cli import main
from soppu.compress import Bundle
from soppu.compress.lorax_export import export
from soppu.errors import AdapterError, TargetError
from soppu.federation.simulation import free_port
from soppu.files import sha256_file
from soppu.targets.lorax_volume import Volume
from soppu.targets.verify import POINTS
from soppu.targets.verify_form import RULES, check
from soppu.targets.verify_reference import Reference, read
from soppu.targets.verify_server import Server
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble

PROMPT = "the quick"
ADMIN = {"authorization": f"Bearer {tiny.TOKEN}"}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = tiny.llama()
    return tiny.bundle({f"user{n}": tiny.lora(model, seed=n) for n in (1, 2, 3)}, rank=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def file(bundle: Bundle, tmp_path: Path) -> Path:
    bundle.save(tmp_path / "users.soppu")
    return tmp_path / "users.soppu"


@pytest.fixture
def double(tmp_path: Path) -> Iterator[LoraxDouble]:
    (tmp_path / "data").mkdir()
    with LoraxDouble(tmp_path / "data", tiny.llama(), tiny.tokenizer()) as made:
        yield made


@pytest.fixture
def ids(double: LoraxDouble, bundle: Bundle, file: Path) -> dict[str, str]:

    volume = Volume.open(str(double.root))
    return volume.stage(bundle, bundle_id=sha256_file(file), base_model="tiny", layers=2)


@pytest.fixture
def folders(double: LoraxDouble, bundle: Bundle) -> Path:
    """The users' folders below the double's root, without a volume's manifest."""
    export(bundle, double.root / "plain", layers=2, base_model="tiny")
    return double.root / "plain"


def run(url: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify-target", url, "--prompt", PROMPT, *map(str, arguments)])


def verdicts(url: str, *arguments: object) -> tuple[dict[str, str], dict[str, str]]:
    """Point -> verdict, and point -> detail; the exit code goes by the verdicts."""
    result = run(url, "--json", *arguments)
    points = json.loads(result.stdout)["points"]
    assert [point["name"] for point in points] == list(POINTS)
    found = {point["name"]: point["verdict"] for point in points}
    assert result.exit_code == int("fail" in found.values()), result.output
    return found, {point["name"]: point["detail"] for point in points}


def failing(found: dict[str, str]) -> set[str]:
    return {name for name, verdict in found.items() if verdict == "fail"}


def test_a_good_lorax_passes_every_point(
    double: LoraxDouble, ids: dict[str, str], file: Path, base: Path
) -> None:
    asked = ("--bundle", file, "--volume", double.root, "--model", base)
    found, details = verdicts(double.url, *asked)
    assert failing(found) == set()
    tried = {name for name, verdict in found.items() if verdict == "pass"}
    assert set(POINTS) - tried == {"merges", "control", "paths", "drain"}
    assert details["info"] == "lorax, tiny" and "within 0.5" in details["canary"]
    printed = run(double.url, *asked)
    assert printed.exit_code == 0 and "20 passed, 0 failed, 4 not applicable" in printed.output
    assert len([line for line in printed.output.splitlines() if line.split()[:1] == ["canary"]]) == 1


def test_what_is_not_at_hand_is_not_applicable_and_does_not_fail(double: LoraxDouble, folders: Path) -> None:
    found, details = verdicts(double.url, "--adapters", folders, "--volume", double.root, "--user", "user2")
    assert failing(found) == set() and found["canary"] == "not applicable"
    assert "give --model" in details["canary"] and double.asked[-2][0] == "plain/user2"
    assert {name for name, _ in double.asked} == {"", "plain/user2", double.asked[-1][0]}


Break = Callable[[LoraxDouble, dict[str, str]], None]


def _set(**values: Any) -> Break:
    def change(double: LoraxDouble, _: dict[str, str]) -> None:
        for name, value in values.items():
            setattr(double.faults, name, value)

    return change


@pytest.mark.parametrize(
    ("broken", "points", "detail"),
    [
        (lambda double, ids: double.faults.silent_base.add(ids["user2"]), {"effect"}, "user2: the answer is"),
        (lambda double, ids: double.faults.refused.add(ids["user3"]), {"answers"}, "user3: HTTP 424: Req"),
        (_set(load_seconds=0.6), {"warm"}, "user1: no answer within 0.3 s"),
        (_set(dies_after=2), {"alive"}, "refused or cut"),
        (_set(fails_batch=True), {"base"}, "HTTP 424"),
        (_set(unhealthy=True), {"health"}, "HTTP 503"),
        (_set(base_for_missing=True), {"missing"}, "HTTP 200, expected 424: the base model answers"),
        (_set(no_header=True), {"header"}, "user1: asked for"),
        (lambda double, ids: setattr(double, "model_id", "x"), {"base name", "answers"}, "the server's"),
        (lambda double, ids: shutil.rmtree(double.root / ids["user1"]), {"answers", "files"}, "user1"),
    ],
)  # fmt: skip
def test_each_fault_of_a_lorax_fails_its_own_point(
    double: LoraxDouble,
    ids: dict[str, str],
    file: Path,
    base: Path,
    broken: Break,
    points: set[str],
    detail: str,
) -> None:
    broken(double, ids)
    more = ("--within", 0.3) if points == {"warm"} else ()
    found, details = verdicts(double.url, "--bundle", file, "--volume", double.root, "--model", base, *more)
    assert failing(found) == points
    assert any(detail in details[name] for name in points)


def test_a_folder_changed_in_place_is_found_on_the_disk_and_in_the_answers(
    double: LoraxDouble, ids: dict[str, str], file: Path, base: Path
) -> None:
    asked = ("--bundle", file, "--volume", double.root, "--model", base)
    assert failing(verdicts(double.url, *asked)[0]) == set()
    one, two = (double.root / ids[user] for user in ("user1", "user2"))
    shutil.rmtree(one)
    shutil.copytree(two, one)
    found, details = verdicts(double.url, *asked)
    assert failing(found) == {"content"} and "user1" in details["content"]  # its old numbers are cached
    double.restart()
    found, details = verdicts(double.url, *asked)
    assert failing(found) == {"content", "canary"} and details["canary"].startswith("user1: token")


def test_an_adapter_cached_under_an_id_that_was_used_again(
    double: LoraxDouble, folders: Path, base: Path
) -> None:
    asked = ("--adapters", folders, "--volume", double.root, "--model", base)
    assert failing(verdicts(double.url, *asked)[0]) == set()
    shutil.rmtree(folders / "user1")
    shutil.copytree(folders / "user2", folders / "user1")
    found, details = verdicts(double.url, *asked)
    assert failing(found) == {"canary"} and details["canary"].startswith("user1: token")


def test_an_adapter_half_updated_after_an_eviction(double: LoraxDouble, folders: Path, base: Path) -> None:
    asked = ("--adapters", folders, "--volume", double.root, "--model", base)
    assert failing(verdicts(double.url, *asked)[0]) == set()
    config = json.loads((folders / "user1/adapter_config.json").read_text())
    rank = config["r"]
    for scale in (0.25,):  # the same change, told otherwise: tensors four times as large, alpha a quarter
        tensors = load_file(folders / "user1/adapter_model.safetensors")
        larger = {name: t / scale if "lora_B" in name else t for name, t in tensors.items()}
        save_file(larger, folders / "user1/adapter_model.safetensors")
        changed = json.dumps(config | {"lora_alpha": rank * scale})
        (folders / "user1/adapter_config.json").write_text(changed)
    double.evict("plain/user1")
    found, details = verdicts(double.url, *asked)
    assert failing(found) == {"canary", "alpha"} and details["canary"].startswith("user1: token")
    assert "lora_alpha 2.0, r 8" in details["alpha"]


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> None:
    path = folder / "adapter_model.safetensors"
    made = [change(name, tensor) for name, tensor in load_file(path).items()]
    save_file(dict(one for one in made if one is not None), path)


def _configured(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "points", "detail"),
    [
        (_configured(base_model_name_or_path="org/else"), {"base name"}, "'org/else'"),
        (_configured(lora_alpha=16), {"alpha"}, "lora_alpha 16, r 8"),
        (_configured(use_rslora=True), {"alpha"}, "use_rslora = true"),
        (_configured(r=4, lora_alpha=4), {"rank"}, "r 4, tensors of rank [8]"),
        (lambda folder: rewrite(folder, lambda n, t: (n, t.float())), {"dtype"}, "F32; allowed: F16, BF16"),
        (
            lambda folder: rewrite(folder, lambda n, t: None if ".layers.1.self_attn.q" in n else (n, t)),
            {"uniform"},
            "q_proj is missing on layers [1]",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: (n.replace(".weight", ".default.weight"), t)),
            {"names"},
            "is ignored by LoRAX",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: None if "0.self_attn.q_proj.lora_B" in n else (n, t)),
            {"names"},
            "q_proj: lora_B is missing",
        ),
        (
            lambda folder: rewrite(folder, lambda n, t: (n, t[:, :-1].clone() if "lora_A" in n else t)),
            {"names"},
            "the base model has (32, 32)",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            {"files"},
            "tokenizer.json: LoRAX would",
        ),
        (lambda folder: (folder / "adapter_model.bin").write_text(""), {"files"}, "adapter_model.bin"),
        (
            lambda folder: save_file(
                load_file(folder / "adapter_model.safetensors"),
                folder / "adapter_model.safetensors",
                metadata={"total_size": "1"},
            ),
            {"files"},
            "total_size",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), {"files"}, "not JSON"),
    ],
)
def test_each_fault_of_a_folder_is_named(
    double: LoraxDouble,
    folders: Path,
    base: Path,
    change: Callable[[Path], None],
    points: set[str],
    detail: str,
) -> None:
    change(folders / "user1")
    asked = ("--adapters", f"user1={folders / 'user1'}", "--volume", double.root)
    if "base model has" in detail:
        reference = Reference.load(str(base), cache=base)

        found = check({"user1": folders / "user1"}, model_id="tiny", shapes=reference.shapes)
        assert {name for name, faults in found.items() if faults} == points
        assert any(detail in fault for fault in found["names"])
        return
    found, details = verdicts(double.url, *asked)
    assert failing(found) & set(RULES) == points
    assert any(detail in details[name] for name in points)


def test_a_fleet_of_two_ranks_is_named(double: LoraxDouble, folders: Path, bundle: Bundle) -> None:
    wide = tiny.bundle({"wide": tiny.lora(tiny.llama(), seed=9, rank=12)})
    export(wide, double.root / "other", layers=2, base_model="tiny")
    shutil.move(double.root / "other/wide", folders / "wide")
    found, details = verdicts(double.url, "--adapters", folders, "--volume", double.root)
    assert failing(found) == {"rank"} and "ranks [8, " in details["rank"]


@pytest.mark.parametrize("name", ["a,b", "žofie", "with space"])
def test_an_id_that_ends_in_a_header_is_named(double: LoraxDouble, folders: Path, name: str) -> None:
    (folders / "user1").rename(folders / name)
    result = run(double.url, "--adapters", f"u={folders / name}", "--volume", double.root, "--json")
    points = {point["name"]: point for point in json.loads(result.stdout)["points"]}
    assert points["id"]["verdict"] == "fail" and name in points["id"]["detail"]


def test_the_wrong_base_model_inside_is_found(
    double: LoraxDouble, ids: dict[str, str], file: Path, tmp_path: Path
) -> None:
    tiny.llama(seed=7).save_pretrained(tmp_path / "else")
    tiny.tokenizer().save_pretrained(tmp_path / "else")
    found, details = verdicts(
        double.url, "--bundle", file, "--volume", double.root, "--model", tmp_path / "else"
    )
    assert failing(found) == {"base", "canary"} and "token 1" in details["base"]


def test_dangerous_requests_are_sent_only_where_they_are_asked_for(
    double: LoraxDouble, ids: dict[str, str], file: Path
) -> None:
    asked = ("--bundle", file, "--volume", double.root)
    found, details = verdicts(double.url, *asked)
    assert {found[name] for name in ("merges", "control", "paths")} == {"not applicable"}
    assert "give --dangerous" in details["merges"] and double.is_alive
    found, details = verdicts(double.url, *asked, "--dangerous")
    assert failing(found) == {"paths", "merges"} and not double.is_alive
    assert "it was answered" in details["paths"] and "refused or cut" in details["merges"]
    assert "ended before" in details["control"]


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


def test_what_cannot_be_tried_at_all_is_one_line(
    double: LoraxDouble, ids: dict[str, str], file: Path, folders: Path, tmp_path: Path
) -> None:
    nothing = f"http://127.0.0.1:{free_port()}"
    for arguments, code, said in (
        ((double.url,), 2, "give --bundle FILE or --adapters DIR"),
        ((double.url, "--bundle", file, "--adapters", folders), 2, "one of the two"),
        ((double.url, "--bundle", file), 2, "a LoRAX knows no users: give --volume"),
        ((double.url, "--bundle", file, "--volume", tmp_path), 1, "is not staged here"),
        ((double.url, "--bundle", file, "--volume", tmp_path / "no"), 1, "no such folder"),
        ((double.url, "--adapters", folders, "--volume", folders / "user1"), 2, "is not below the volume"),
        ((double.url, "--adapters", folders, "--user", "nobody"), 2, "nobody: not among the 3 users"),
        ((double.url, "--adapters", folders, "--kind", "embedded"), 1, "/info is not that of a SOPPU server"),
        ((double.url, "--adapters", folders, "--kind", "vllm"), 1, "vllm was looked for"),
        ((nothing, "--adapters", folders), 1, "no answer"),
    ):
        result = run(*map(str, arguments))
        assert result.exit_code == code and said in result.output, result.output
        assert "Traceback" not in result.output


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


def test_a_server_says_what_it_is(double: LoraxDouble, tmp_path: Path) -> None:
    assert Server.find(double.url, kind="auto").kind == "lorax"
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        assert Server.find(url, kind="auto").kind == "embedded"
        assert Server.find(url, kind="lorax").source == "local"
    with pytest.raises(TargetError, match="no answer"):
        Server.find(url, kind="auto")


def test_a_folder_of_two_files_is_one_adapter(
    double: LoraxDouble, ids: dict[str, str], bundle: Bundle
) -> None:
    folder = double.root / ids["user1"]
    for name, pair in read(folder).pairs.items():
        expected = bundle.reconstruct("user1").pairs[name].delta()
        found = pair.B.float() @ pair.A.float()
        assert torch.linalg.norm(found - expected) <= 2e-3 * float(expected.norm())
    rewrite(folder, lambda name, tensor: None if "q_proj" in name else (name, tensor))
    with pytest.raises(AdapterError, match="q_proj: not a pair"):
        read(folder)


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
