"""The LoRAX double does what LoRAX does: answers by the folders under it, with its failures."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import requests

from soppu import adapter
from soppu.adapter import LoraAdapter
from soppu.compress import Bundle
from soppu.targets.lorax_volume import Volume
from tests.soppu.serve import tiny
from tests.soppu.targets.lorax_double import LoraxDouble, double

__all__ = ["double"]

PROMPT = "the quick"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    model = tiny.llama()
    return tiny.bundle({f"user{n}": tiny.lora(model, seed=n) for n in (1, 2)}, rank=8)


@pytest.fixture
def ids(double: LoraxDouble, bundle: Bundle) -> dict[str, str]:
    volume = Volume.open(str(double.root))
    return volume.stage(bundle, bundle_id="1" * 64, base_model="tiny", layers=2)


def ask(double: LoraxDouble, adapter_id: str | None, **more: Any) -> requests.Response:
    parameters = {"adapter_id": adapter_id, "max_new_tokens": 8, "details": True} | more
    return requests.post(
        f"{double.url}/generate", json={"inputs": PROMPT, "parameters": parameters}, timeout=20
    )


def text(double: LoraxDouble, adapter_id: str | None, **more: Any) -> str:
    response = ask(double, adapter_id, **more)
    assert response.status_code == 200, response.text
    return str(response.json()["generated_text"])


def expected(own: LoraAdapter | None) -> str:
    return tiny.peft_text(tiny.llama(), PROMPT, own, tokens=8)


def test_it_answers_with_the_adapter_it_finds(
    double: LoraxDouble, bundle: Bundle, ids: dict[str, str]
) -> None:
    info = requests.get(f"{double.url}/info", timeout=5).json()
    assert requests.get(f"{double.url}/health", timeout=5).text == "" and info["model_id"] == "tiny"
    assert text(double, None) == expected(None)
    for user, adapter_id in ids.items():
        response = ask(double, adapter_id)
        assert response.json()["generated_text"] == expected(bundle.reconstruct(user)) != expected(None)
        assert response.headers["x-adapter-id"] == adapter_id
        details = response.json()["details"]
        assert len(details["tokens"]) == details["generated_tokens"] and details["tokens"][0]["logprob"] < 0
    assert double.loads == dict.fromkeys(ids.values(), 1)


def test_it_reads_from_a_bucket_once(double: LoraxDouble, bundle: Bundle, tmp_path: Path) -> None:
    double._bucket = "memory"
    volume = Volume.open(f"memory://{tmp_path.name}/p")
    ids = volume.stage(bundle, bundle_id="1" * 64, base_model="tiny", layers=2)
    assert text(double, ids["user1"], adapter_source="s3") == expected(bundle.reconstruct("user1"))
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    double.evict(ids["user1"])
    assert text(double, ids["user1"], adapter_source="s3") == expected(bundle.reconstruct("user1"))


def test_a_missing_adapter_and_a_foreign_base_are_424(double: LoraxDouble, ids: dict[str, str]) -> None:
    response = ask(double, "adapters/nobody")
    assert response.status_code == 424 and response.json()["error_type"] == "generation"
    assert "tried None and None" in response.json()["error"]
    double.model_id = "other"
    assert "not compatible" in ask(double, ids["user1"]).json()["error"]


def test_a_change_in_place_is_not_seen_and_half_seen_after_an_eviction(
    double: LoraxDouble, bundle: Bundle, ids: dict[str, str]
) -> None:
    one, two = (double.root / ids[user] for user in ("user1", "user2"))
    first = text(double, ids["user1"])
    config = json.loads((one / "adapter_config.json").read_text())
    shutil.rmtree(one)
    shutil.copytree(two, one)
    (one / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    assert text(double, ids["user1"]) == first
    double.evict(ids["user1"])
    assert text(double, ids["user1"]) == text(double, ids["user2"]) != first  # with the old alpha
    double.restart()
    assert text(double, ids["user1"]) == expected(None)  # with the new one


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q", "layers.0.self_attn.q_proj"])
def test_what_is_named_otherwise_is_the_base_model(double: LoraxDouble, name: str, tmp_path: Path) -> None:
    pair = tiny.lora(tiny.llama(), seed=1).pairs["model.layers.0.self_attn.q_proj"]
    adapter.write(LoraAdapter({name: pair}, base_model="tiny"), double.root / "adapters/odd")
    assert text(double, "adapters/odd") == expected(None)


def test_a_projection_that_one_layer_lacks_is_not_active(double: LoraxDouble) -> None:
    pairs = tiny.lora(tiny.llama(), seed=1, rank=8).pairs
    only = {"model.layers.0.self_attn.q_proj": pairs["model.layers.0.self_attn.q_proj"]}
    adapter.write(LoraAdapter(only, base_model="tiny"), double.root / "adapters/one")
    assert text(double, "adapters/one") == expected(None)


def test_low_ranks_have_the_wrong_scale_and_some_have_no_kernel(double: LoraxDouble) -> None:
    for rank, name in ((4, "low"), (8, "good"), (40, "wide")):
        own = tiny.lora(tiny.llama(), seed=1, rank=rank)
        adapter.write(LoraAdapter(own.pairs, base_model="tiny"), double.root / f"adapters/{name}")
    good = tiny.lora(tiny.llama(), seed=1, rank=8)
    low = tiny.lora(tiny.llama(), seed=1, rank=4)
    assert text(double, "adapters/good") == expected(good)
    assert text(double, "adapters/low") != expected(low)
    assert "No suitable kernel" in ask(double, "adapters/wide").json()["error"]


def test_switched_faults(double: LoraxDouble, ids: dict[str, str]) -> None:
    double.faults.silent_base.add(ids["user1"])
    assert text(double, ids["user1"]) == expected(None)
    double.faults.refused.add(ids["user2"])
    assert ask(double, ids["user2"]).status_code == 424
    double.faults.base_for_missing = True
    assert text(double, "adapters/nobody") == expected(None)
    double.faults.fails_batch = True
    assert ask(double, None).status_code == 424
    double.faults.unhealthy = True
    assert requests.get(f"{double.url}/health", timeout=5).status_code == 503


def test_a_slow_load_takes_its_time(double: LoraxDouble, ids: dict[str, str]) -> None:
    double.faults.load_seconds = 0.3
    begin = time.monotonic()
    ask(double, ids["user1"])
    assert time.monotonic() - begin >= 0.3


def test_it_dies_in_the_middle_and_stays_down_until_it_is_restarted(
    double: LoraxDouble, ids: dict[str, str]
) -> None:
    double.faults.dies_after, url = 1, double.url
    first = text(double, ids["user1"])
    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            ask(double, ids["user1"])
    assert not double.is_alive
    double.restart()
    assert double.url == url and text(double, ids["user1"]) == first
    double.kill()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("generate", {"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "none"}}),
        ("generate_stream", {"adapter_id": "adapters/a\nb"}),
    ],
)
def test_two_shapes_of_requests_end_it(double: LoraxDouble, path: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{double.url}/{path}", json={"inputs": "x", "parameters": parameters}, timeout=20)
    assert not double.is_alive


def test_streams_and_the_root_route(double: LoraxDouble, ids: dict[str, str]) -> None:
    asked = {"inputs": PROMPT, "parameters": {"adapter_id": ids["user1"], "max_new_tokens": 8}}
    (only,) = requests.post(double.url, json=asked, timeout=20).json()
    stream = requests.post(f"{double.url}/generate_stream", json=asked, timeout=20).text
    events = [json.loads(line.removeprefix("data: ")) for line in stream.split("\n\n") if line]
    assert events[-1]["generated_text"] == only["generated_text"] == text(double, ids["user1"])
