"""What people do to the commands ends in one sentence and an exit code, never in a traceback."""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from soppu import adapter
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cli import COMMANDS, main
from tests.conftest import build_model
from tests.thorough import some

NAMES = [f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in ("q_proj", "v_proj")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet of three, their bundle, a base model without a tokenizer, and bad things by name."""
    root = tmp_path_factory.mktemp("place")
    generator = torch.Generator().manual_seed(1)
    for user in ("ann", "bob", "eve"):
        pairs = {
            name: LoraPair(torch.randn(4, 20, generator=generator), torch.randn(24, 4, generator=generator))
            for name in NAMES
        }
        adapter.write(LoraAdapter(pairs), root / "fleet" / user)
    done = soppu("compress", root / "fleet", "--out", root / "bundle", "--ratio", 2)
    assert done.exit_code == 0, done.output
    build_model("llama").save_pretrained(root / "model")
    for name, data in JUNK.items():
        (root / name).write_bytes(data)
    (root / "cut").write_bytes((root / "bundle").read_bytes()[:900])
    shutil.copy(root / "fleet" / "ann" / adapter.WEIGHTS_FILE, root / "weights")
    (root / "folder").mkdir()
    (root / "loop").symlink_to(root / "loop")
    return root


JUNK = {
    "empty": b"",
    "list": b"[1]",
    "object": b"{}",
    "half": b'{"a": ',
    "latin": b'{"a": "\xff\xfe"}',
    "bytes": bytes(range(256)) * 20,
    "deep": b"[" * 100_000,
}
BAD = [*JUNK, "cut", "weights", "folder", "loop", "absent", "empty/below", "x" * 300, "\udcff", "-x"]

# A command with one hole, `{}`, for each thing that a person names.
CALLS = {
    "inspect a bundle": "inspect {}",
    "inspect a user": "inspect bundle --user {}",
    "project onto": "project {} new=fleet/ann --out out --max-error 0.9",
    "project from": "project bundle new={} --out out --max-error 0.9",
    "remove from": "remove {} ann --out out",
    "remove whom": "remove bundle {} --out out",
    "export from": "export {} --out out",
    "export into": "export bundle --out {}/out",
    "export whom": "export bundle --out out --user {}",
    "compress what": "compress {} --out out",
    "compress as": "compress {}=fleet/ann --out out --max-error 0.5",
    "compress by moments": "compress fleet --out out --moments {}",
    "compress on": "compress fleet --out out --device {}",
    "compress for": "compress fleet --out out --base {}",
    "calibrate a model": "calibrate {} --out out",
    "calibrate by": "calibrate model --out out --source {}",
    "data of": "data {}",
    "data by": "data absent --config {}",
    "data set": "data folder --set users=['{}']",
    "data for": "data folder --model {}",
    "serve a model": "serve --model {}",
    "serve a bundle": "serve --model folder --bundle {}",
    "serve an adapter": "serve --model folder --adapter x={}",
    "serve at": "serve --model folder --state {}",
    "train for": "train {}",
    "train on": "train folder --device {}",
    "train layers": "train folder --layers {}",
    "evaluate a run": "evaluate {}",
    "dashboard of": "dashboard --registry {}",
    "dashboard from": "dashboard --registry absent --catalogue {}",
    "dashboard at": "dashboard --target {}",
    "export tasks of": "export-tasks {} out",
    "export tasks into": "export-tasks folder {}",
    "serve a router": "serve --model folder --router {} --router-mode on",
    "router of a run": "router fit {}",
    "router by a policy": "router fit folder --policy {}",
    "router with a cheaper arm": "router fit folder --cheaper {}",
    "router in": "router show {}",
    "report of": "report {}",
    "run by": "run --config {}",
    "run with": "run --config absent --set {}",
    "run at": "run --config empty --api {}",
    "run what": "run --config empty --api http://127.0.0.1:9 --deployment {}",
    "join as": "join {} --data absent --run folder",
    "join with": "join ann --data {} --run folder",
    "join what": "join ann --data absent --run {}",
    "join at": "join ann --data absent --run folder --target {}",
    "join for": "join ann --data absent --url http://127.0.0.1:9 --config {}",
    "join by": "join ann --data absent --url {} --config absent",
    "join from": "join ann --data absent --run folder --shared {}",
    "admit from": "admit --run {}",
    "admit at": "admit --run folder --target {}",
    "watch what": "watch {}",
    "watch among": "watch --runs {}",
    "users in": "users --registry {}",
    "users of": "users --registry absent --catalogue {}",
    "users of sqlite": "users --registry absent --catalogue sqlite:///{}",
    "bases in": "bases --registry {}",
    "bases which": "bases --use {} --registry folder",
    "show whom": "show {} --registry folder",
    "forget whom": "forget {} --registry folder --yes",
    "members of": "federation unregister ours --user ann --members {}",
    "gateway by": "gateway --config {}",
    "gateway of": "gateway --registry {}",
    "gateway with": "gateway --registry absent --set {}",
    "keys for": "keys create {} --registry folder",
    "keys of": "keys list --registry {}",
    "keys without": "keys revoke {} --registry folder",
    "resolve whom": "resolve {} --registry folder",
    "resolve in": "resolve ann --registry {}",
    "verify at": "verify-target {} --bundle bundle",
    "verify a bundle": "verify-target http://127.0.0.1:9 --bundle {}",
    "verify folders": "verify-target http://127.0.0.1:9 --adapters {}",
    "roll back in": "rollback --registry {}",
    "roll back at": "rollback --registry folder --url {}",
}


def soppu(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def in_one_sentence(result: Result) -> str:
    """The message; the output of a fault of ours has none, and its exception is another."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ") or result.output.startswith("Error: "), result.output
    return last


def test_every_command_is_tried() -> None:
    assert {words.split()[0] for words in CALLS.values()} == set(COMMANDS)


# every command with a third of them, every one of them with a third of the commands
EACH = [(call, bad) for call in CALLS for bad in BAD]
OFTEN = [(call, bad) for m, call in enumerate(CALLS) for n, bad in enumerate(BAD) if (m + n) % 3 == 0]


@pytest.mark.parametrize(("call", "bad"), some(EACH, *OFTEN), ids=ascii)
def test_a_bad_thing_in_any_place_is_told(
    place: Path, call: str, bad: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    there = {*place.iterdir(), *(place / "folder").iterdir()}
    result = soppu(*(word.replace("{}", bad) for word in CALLS[call].split(" ")))
    for left in {*place.iterdir(), *(place / "folder").iterdir()} - there:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if result.exit_code == 0:  # a name or a folder that can be used
        assert call in ("compress as", "export into") and result.exception is None
    else:
        in_one_sentence(result)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("junk", JUNK)
def test_a_base_model_with_a_bad_file_is_told(place: Path, tmp_path: Path, part: str, junk: str) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / part).write_bytes(JUNK[junk])
    result = soppu("calibrate", tmp_path / "model", "--out", tmp_path / "out")
    assert str(tmp_path / "model") in in_one_sentence(result)


@pytest.mark.parametrize("part", [adapter.CONFIG_FILE, adapter.WEIGHTS_FILE, adapter.IDENTITY_FILE])
@pytest.mark.parametrize("junk", [name for name in JUNK if name != "object"])
def test_an_adapter_with_a_bad_file_is_told(place: Path, tmp_path: Path, part: str, junk: str) -> None:
    shutil.copytree(place / "fleet" / "ann", tmp_path / "ann")
    (tmp_path / "ann" / part).write_bytes(JUNK[junk])
    assert part in in_one_sentence(soppu("compress", tmp_path / "ann", "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    "words",
    [
        "compress fleet --out out --rank -3 --method joint",
        "compress fleet --out out --ratio nan",
        "compress fleet --out out --max-error -1",
        "compress fleet --out out --clusters 0 --method cluster",
        "compress fleet --out out --device cuda:99",
        "compress fleet --out out --method of-tomorrow",
        "project bundle new=fleet/ann --out out --max-error nan",
        "project bundle ann=fleet/ann --out out --max-error 0.5",
        "remove bundle ann bob eve --out out",
        "calibrate model --out out --modules (",
        "users --registry s3://bucket/x",
        "users --registry foo://x",
        "users --catalogue mysql://x",
        "serve --adapter nonsense",
        "serve --port 99999",
    ],
)
def test_a_value_that_cannot_be_is_told(place: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    in_one_sentence(soppu(*words.split()))
    assert not (place / "out").exists()


@pytest.mark.parametrize("clusters", [4, 99])
def test_more_clusters_than_users_are_no_fault(place: Path, tmp_path: Path, clusters: int) -> None:
    words = [
        "compress",
        place / "fleet",
        "--out",
        tmp_path / "out",
        "--method",
        "cluster",
        "--clusters",
        clusters,
    ]
    assert soppu(*words).exit_code == 0
    assert soppu("inspect", tmp_path / "out").exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "bundle", tmp_path / "secret")
    (tmp_path / "secret").chmod(0)
    assert "Permission denied" in in_one_sentence(soppu("inspect", tmp_path / "secret"))


def test_a_device_is_not_replaced_by_a_file(place: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = in_one_sentence(soppu("remove", place / "bundle", "ann", "--out", tmp_path / "pipe"))
    assert "is a folder or a device" in said and (tmp_path / "pipe").is_fifo()


# ---- as a shell runs it


def process(*words: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "soppu.cli", *map(str, words)]
    pipes: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def test_a_disk_that_refuses_is_told_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    unwritten = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # else cut off too, and kept
    line = ("remove", place / "bundle", "ann", "--out", tmp_path / "out")
    run = process(*line, preexec_fn=small, env=unwritten)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 1 and said.startswith("Error: ") and "File too large" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_output_that_has_no_room_is_told(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = process("inspect", place / "bundle", stdout=full)
        _, said = run.communicate(timeout=120)
    assert run.returncode != 0 and "No space left" in said and "Traceback" not in said


def test_a_reader_that_goes_away_is_no_error(place: Path) -> None:
    run = process("inspect", place / "bundle", "--json")
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()  # as `head` does
    assert run.stderr.read() == ""
    assert run.wait(120) == 1


def opened(pipe: Path) -> int | None:
    """The writing end of a named pipe, once somebody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def test_ctrl_c_says_aborted(place: Path) -> None:
    """While it waits for the bundle that a named pipe never brings."""
    pipe = place / "slow"
    os.mkfifo(pipe)
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # nohup ignores it
    run = process("inspect", pipe, preexec_fn=heard)
    while (writer := opened(pipe)) is None:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    os.close(writer)
    assert run.returncode == 1 and said.strip() == "Aborted!"


@pytest.mark.parametrize(
    ("package", "words", "status", "said"),
    [
        ("uvicorn", ["serve"], 2, "Error: soppu serve needs uvicorn: pip install 'soppu[serve]'"),
        ("matplotlib", ["report", "."], 1, "Error: this command needs the Python package 'matplotlib'"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    package: str, words: list[str], status: int, said: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from soppu.cli import main; main({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stderr.startswith(said)


def test_a_fault_of_ours_still_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("soppu.commands.users._open", lambda *_: broken())
    assert isinstance(soppu("users").exception, RuntimeError)
