"""A server that is told to stop before it serves: wherever it is, at once, quietly, as after any stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from soppu.cli import main
from soppu.commands.until_told import until_told
from soppu.federation.simulation import free_port
from tests.soppu.serve import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


def stopped_at(fifo: Path, number: int, command: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and output of a server that is told so as soon as it reads `fifo`, which has no end."""
    server = subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    with fifo.open("wb"):  # waits for the server
        server.send_signal(number)
        output, _ = server.communicate(timeout=60)
    return server.returncode, output


def serve(base: Path, folder: Path, *words: object) -> list[str]:
    options = [
        "--model",
        base,
        "--port",
        free_port(),
        "--state",
        folder / "state",
        "--cache",
        folder / "cache",
    ]
    return [sys.executable, "-m", "soppu.cli", "serve", *map(str, [*options, *words])]


@pytest.mark.parametrize(
    ("number", "swallows"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_while_it_imports(number: int, swallows: bool, base: Path, tmp_path: Path) -> None:
    fifo, there = tmp_path / "fifo", tmp_path / "path"
    os.mkfifo(fifo)
    there.mkdir()
    reading = f"open({str(fifo)!r}).read()"
    if swallows:
        reading = f"try: {reading}\nexcept BaseException: pass\nimport time; time.sleep(60)"
    (there / "torch.py").write_text(reading)
    path = os.pathsep.join(filter(None, [str(there), os.environ.get("PYTHONPATH", "")]))
    code, output = stopped_at(fifo, number, serve(base, tmp_path), PYTHONPATH=path)
    assert code == 0, output
    assert len(output.splitlines()) == 1 and f"stopped by {signal.Signals(number).name}" in output


@pytest.mark.long
@pytest.mark.parametrize(("number", "what"), [(signal.SIGTERM, "bundle"), (signal.SIGINT, "model")])
def test_while_it_loads(number: int, what: str, base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(base, tmp_path / "mine"))
    fifo, words = tmp_path / "fifo", []
    if what == "model":
        fifo = mine / "model.safetensors"
        fifo.unlink()
    else:
        words = ["--bundle", fifo]
    os.mkfifo(fifo)
    code, output = stopped_at(fifo, number, serve(mine, tmp_path, *words))
    assert code == 0, output
    assert "Traceback" not in output and "Exception" not in output
    assert output.splitlines()[-1].endswith(f"stopped by {signal.Signals(number).name} before it served")
    assert sum("INFO" in line for line in output.splitlines()) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_who_only_asks_for_help_finds_signals_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for words in (["serve", "--help"], ["serve", "--port", "-1"]):
        CliRunner().invoke(main, words)
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with until_told():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert signal.getsignal(signal.SIGTERM) == before[0]
