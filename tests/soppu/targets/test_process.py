"""Starting and ending processes by pid file: whose file it is, and whose process answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from soppu import files
from soppu.errors import TargetError
from soppu.targets import process

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def launch(folder: Path, *command: str) -> process.Launch:
    return process.Launch(command, folder / "log", folder / "server.pid")


def test_ready_is_not_enough_where_another_process_answers(tmp_path: Path) -> None:
    options = launch(tmp_path, sys.executable, "-c", "print('the lock is taken'); raise SystemExit(3)")

    def ready() -> bool:
        while process.running(options.pid_file):
            pass
        return True

    with pytest.raises(TargetError, match=r"(?s)the server ended with exit code .*the lock is taken"):
        process.start(options, ready=ready, timeout=30)
    assert not options.pid_file.exists()


def test_a_failed_start_leaves_the_pid_file_of_another_process(tmp_path: Path) -> None:
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    other, options = launch(tmp_path, *SLEEP), launch(tmp_path, sys.executable, "-c", wait)
    try:

        def overwrite() -> bool:
            """As a second start without the lock would; ours has ended by the next look."""
            go.touch()
            while process.running(options.pid_file):
                pass
            process.start(other, ready=lambda: True, timeout=30)
            return False

        with pytest.raises(TargetError, match="ended with exit code"):
            process.start(options, ready=overwrite, timeout=30)
        assert process.running(other.pid_file)
    finally:
        assert process.stop(other.pid_file)


def test_nothing_is_started_over_a_process_that_runs(tmp_path: Path) -> None:
    options = launch(tmp_path, *SLEEP)
    pid = process.start(options, ready=lambda: True, timeout=30)
    try:
        with pytest.raises(TargetError, match=r"server\.pid: names a process that still runs"):
            process.start(options, ready=lambda: True, timeout=30)
        assert json.loads(options.pid_file.read_text())["pid"] == pid
    finally:
        assert process.stop(options.pid_file)


def test_held_lets_one_in_at_a_time(tmp_path: Path) -> None:
    inside = threading.Event()

    def enter() -> None:
        with process.held(tmp_path / "server.pid"):
            inside.set()

    thread = threading.Thread(target=enter)
    with process.held(tmp_path / "server.pid"):
        thread.start()
        assert not inside.wait(0.2)
        with pytest.raises(BlockingIOError), files.exclusive(tmp_path / "server.pid.lock", wait=False):
            pass
    thread.join(30)
    assert inside.is_set()


def test_a_failed_start_names_the_first_error_of_a_long_log(tmp_path: Path) -> None:
    lines = [
        "(Worker pid=7) ERROR 11-26 [core.py:9] ValueError: memory is short",
        *(f"  frame {n}" for n in range(40)),
    ]
    code = f"print({chr(10).join([*lines, 'RuntimeError: see above'])!r}); raise SystemExit(1)"
    with pytest.raises(TargetError, match=r"(?s)memory is short\n\[\.\.\.\]\n.*RuntimeError: see above$"):
        process.start(launch(tmp_path, sys.executable, "-c", code), ready=lambda: False, timeout=30)


def test_workers_of_a_process_that_has_to_be_killed_end_with_it(tmp_path: Path) -> None:
    stubborn = "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    worker = f"subprocess.Popen([sys.executable, '-c', {stubborn + 'import time; time.sleep(60)'!r}])"
    options = launch(
        tmp_path, sys.executable, "-c", f"{stubborn}print({worker}.pid, flush=True)\n{worker}.wait()"
    )
    process.start(options, ready=lambda: options.log.read_text().endswith("\n"), timeout=30)
    assert process.stop(options.pid_file, grace=0.2)
    pid = int(options.log.read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_process_that_got_the_pid_of_another_is_left_alone(tmp_path: Path) -> None:
    options = launch(tmp_path, *SLEEP)
    pid = process.start(options, ready=lambda: True, timeout=30)
    ours = options.pid_file.read_text()
    try:
        other = json.loads(ours)
        options.pid_file.write_text(json.dumps(other | {"mark": f"{float(other['mark']) - 60:.2f}"}))
        assert not process.running(options.pid_file)
        assert not process.stop(options.pid_file) and not options.pid_file.exists()
        assert is_running(pid)
    finally:
        options.pid_file.write_text(ours)
        assert process.stop(options.pid_file)
    assert not is_running(pid)


def test_the_file_means_the_same_to_another_process(tmp_path: Path) -> None:
    options = launch(tmp_path, *SLEEP)
    pid = process.start(options, ready=lambda: True, timeout=30)
    code = (
        "import sys, pathlib; from soppu.targets import process; file = pathlib.Path(sys.argv[1]);"
        "print(process.running(file), process.stop(file, grace=2))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(options.pid_file)], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert not is_running(pid) and not options.pid_file.exists()


def test_a_process_nobody_has_waited_for_has_ended(tmp_path: Path) -> None:
    options = launch(tmp_path, *SLEEP)
    pid = process.start(options, ready=lambda: True, timeout=30)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not process.running(options.pid_file)
    assert not process.stop(options.pid_file)


def is_running(pid: int) -> bool:
    """Whether a process is there and not just waiting for its parent to ask how it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
