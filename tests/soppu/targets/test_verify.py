"""`soppu verify-target`: a good LoRAX passes every point, and each thing that goes wrong fails its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from soppu.errors import TargetError
from soppu.federation.simulation import free_port
from soppu.targets.verify import POINTS
from soppu.targets.verify_server import Server
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble, double
from tests.soppu.targets.verified import base, bundle, failing, file, folders, ids, run, verdicts

__all__ = ["base", "bundle", "double", "file", "folders", "ids"]


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


def test_a_server_says_what_it_is(double: LoraxDouble, tmp_path: Path) -> None:
    assert Server.find(double.url, kind="auto").kind == "lorax"
    with tiny.served(tiny.llama(), tmp_path / "state") as url:
        assert Server.find(url, kind="auto").kind == "embedded"
        assert Server.find(url, kind="lorax").source == "local"
    with pytest.raises(TargetError, match="no answer"):
        Server.find(url, kind="auto")
