"""`soppu serve` is told what LoRAX's launcher is told, by the same names, and answers as LoRAX then does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner

from soppu import adapter
from soppu.cli import main
from soppu.commands import serve
from soppu.serve.server import ServeOptions
from tests.soppu.serve import tiny

ALICE = "adapters/alice/0f3c9a"
PROMPT = "the quick"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What servers were started with; none is."""
    options = list[ServeOptions]()
    monkeypatch.setattr(serve, "run", options.append)
    return options


def run(*words: object, **environment: str) -> str:
    result = CliRunner().invoke(main, ["serve", *map(str, words)], env=environment)
    return "" if result.exit_code == 0 else result.output


def test_the_environment_says_what_the_options_say(started: list[ServeOptions], tmp_path: Path) -> None:
    names = {
        "MODEL_ID": "org/Base",
        "PORT": "81",
        "HUGGINGFACE_HUB_CACHE": str(tmp_path),
        "MAX_ACTIVE_ADAPTERS": "7",
        "DEFAULT_ADAPTER_SOURCE": "local",
        "MAX_CONCURRENT_REQUESTS": "39",
        "MAX_INPUT_LENGTH": "300",
        "MAX_TOTAL_TOKENS": "400",
        "MAX_BATCH_TOTAL_TOKENS": "800",
        "MAX_BEST_OF": "5",
        "HOSTNAME": "6f0c2d",  # docker sets it in every container
    }
    assert run(**names) == ""
    words = ["--model", "org/Base", "--port", 81, "--adapters", tmp_path, "--max-active-adapters", 7]
    words += ["--max-concurrent-requests", 39, "--max-input-tokens", 300, "--max-total-tokens", 400]
    words += ["--max-best-of", 5, "--max-batch-total-tokens", 800]
    assert run(*words) == ""
    assert started[0] == started[1]
    limits = started[0].engine
    assert (limits.max_batch + limits.max_queue, limits.max_input_tokens, limits.max_total_tokens) == (
        39,
        300,
        400,
    )
    assert (limits.max_best_of, limits.max_batch_total_tokens) == (5, 800)
    assert (started[0].mount, started[0].max_active_adapters, started[0].host) == (tmp_path, 7, "127.0.0.1")


def test_an_option_wins_over_the_environment_and_an_empty_name_says_nothing(
    started: list[ServeOptions], tmp_path: Path
) -> None:
    assert run("--port", 82, "--model", "mine", PORT="81", MODEL_ID="org/Base") == ""
    assert (started[0].port, started[0].model, started[0].mount) == (82, "mine", None)
    empty = dict.fromkeys(("PORT", "MODEL_ID", "HUGGINGFACE_HUB_CACHE", "DEFAULT_ADAPTER_SOURCE"), "")
    assert run(**empty) == ""
    assert run() == "" and started[1] == started[2]
    assert started[1].max_active_adapters == 1024


@pytest.mark.parametrize(
    ("together", "batch", "queue"), [(2, 1, 1), (32, 31, 1), (33, 32, 1), (1024, 32, 992)]
)
def test_as_many_requests_run_and_wait_as_lorax_would_let_in(
    started: list[ServeOptions], together: int, batch: int, queue: int
) -> None:
    assert run(MAX_CONCURRENT_REQUESTS=str(together)) == ""
    assert (started[0].engine.max_batch, started[0].engine.max_queue) == (batch, queue)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_CONCURRENT_REQUESTS", "1", "1 is not in the range x>=2"),
        ("MAX_TOTAL_TOKENS", "-4", "-4 is not in the range"),
        ("MAX_BATCH_TOTAL_TOKENS", "-1", "-1 is not in the range"),
        ("DEFAULT_ADAPTER_SOURCE", "hub", "'hub', allowed: 'local'; this server fetches no adapters"),
        ("DEFAULT_ADAPTER_SOURCE", "S3", "'S3', allowed: 'local'"),
        ("MAX_ACTIVE_ADAPTERS", "0", "0 is not in the range x>=1"),
        ("MAX_ACTIVE_ADAPTERS", "many", "'many' is not a valid integer"),
        ("HUGGINGFACE_HUB_CACHE", "/nowhere/at/all", "Directory '/nowhere/at/all' does not exist"),
        ("MAX_BEST_OF", "0", "0 is not in the range x>=1"),
        ("MAX_BEST_OF", "129", "--max-best-of: 129, allowed: up to 128"),
        ("PORT", "80000", "80000 is not in the range"),
    ],
)
def test_a_value_that_cannot_be_meant_ends_the_start_with_its_name(
    started: list[ServeOptions], name: str, value: str, message: str
) -> None:
    output = run(**{name: value})
    assert message in " ".join(output.split()) and not started


@pytest.mark.slow
@pytest.mark.long
def test_a_server_driven_by_its_environment_answers_an_adapter_of_the_base_it_names(tmp_path: Path) -> None:
    model, base, root = tiny.llama(), tmp_path / "models" / "tiny", tmp_path / "data"
    model.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    made = tiny.lora(model, seed=1)
    adapter.write(made, root / ALICE)
    (root / ALICE / adapter.IDENTITY_FILE).unlink()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {"MODEL_ID": str(base), "PORT": str(port), "HUGGINGFACE_HUB_CACHE": str(root), "MAX_BEST_OF": "3"}
    command = [sys.executable, "-m", "soppu.cli", "serve", "--state", str(tmp_path / "state")]
    server = subprocess.Popen(command, env=os.environ | names | {"HOSTNAME": "elsewhere.invalid"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_listening(server, port)
            served = client.get("/info").json()["model_id"]
            assert served == str(base)
            config = json.loads((root / ALICE / adapter.CONFIG_FILE).read_text())
            config["base_model_name_or_path"] = served
            (root / ALICE / adapter.CONFIG_FILE).write_text(json.dumps(config))
            parameters = {"adapter_id": ALICE, "adapter_source": "local", "max_new_tokens": 6}
            answer = client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
            told = {"inputs": PROMPT, "parameters": {"details": True, "do_sample": True, "max_new_tokens": 2}}
            for best_of, status in ((3, 200), (4, 422)):
                told["parameters"]["best_of"] = best_of
                best = client.post("/generate", json=told)
                assert best.status_code == status, best.text
                if status == 200:
                    assert len(best.json()["details"]["best_of_sequences"]) == 2
            assert client.get("/info").json()["max_best_of"] == 3
        torch.set_num_threads(1)
        assert answer.json()["generated_text"] == tiny.peft_text(model, PROMPT, made, tokens=6)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_until_listening(server: subprocess.Popen[bytes], port: int) -> None:
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.1)
    pytest.fail(f"the server ended with {server.returncode}")
