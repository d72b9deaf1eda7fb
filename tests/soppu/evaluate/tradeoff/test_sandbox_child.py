"""What the starter of programs does by itself: what it refuses, what it says, in which order it works.

That a program is really kept apart is tested in `test_human_eval`, in processes.
"""

from __future__ import annotations

import ctypes
import errno
import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from soppu.evaluate.tradeoff import sandbox_child

ASKED = {
    "program": "",
    "word": "w",
    "folder": "",
    "memory": 1 << 28,
    "seconds": 6,
    "processes": 8,
    "files": 99,
}


@pytest.fixture
def _asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is to be run is on standard input, in no namespaces; files that the starter opens are closed."""
    opened: list[int] = []
    plain_open, plain_pipe = os.open, os.pipe

    def pipe() -> tuple[int, int]:
        opened.extend(both := plain_pipe())
        return both

    def one(*words: Any) -> int:
        opened.append(found := plain_open(*words))
        return found

    monkeypatch.setattr(os, "open", one)
    monkeypatch.setattr(os, "pipe", pipe)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(ASKED).encode())))
    monkeypatch.setattr(sandbox_child, "_apart", lambda: None)
    yield
    for number in opened:
        with suppress(OSError):
            os.close(number)


class Libc:
    """Calls that would change this process: only noted; the one named `fails` does."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*words: Any) -> int:
            self.calls.append((name, words))
            if name != self._fails:
                return 0
            ctypes.set_errno(errno.EPERM)
            return -1

        return call


def refuse() -> None:
    raise OSError(errno.EINVAL, "unshare: Invalid argument")


def fail(asked: dict[str, Any]) -> None:
    raise ValueError(f"no room for {asked['files']}")


@pytest.mark.usefixtures("_asked")
def test_a_machine_that_gives_no_namespaces_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_child, "_apart", refuse)
    assert sandbox_child.main() == sandbox_child.REFUSED
    assert "unshare: Invalid argument" in capsys.readouterr().err


@pytest.mark.usefixtures("_asked")
def test_what_fails_before_the_program_starts_is_told_by_its_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_child, "_start", fail)
    assert sandbox_child.main() == sandbox_child.REFUSED
    assert capsys.readouterr().err == "no room for 99"


@pytest.mark.usefixtures("_asked")
def test_the_end_of_the_program_is_waited_for_whatever_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_child, "_start", lambda asked: os.execv("/bin/false", ["false"]))
    assert sandbox_child.main() == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("user", "own"), [(0, 0), (1000, 0x10000000)])
def test_who_is_not_root_gets_a_namespace_of_users_and_a_failure_names_the_call(
    user: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc(fails="unshare")
    monkeypatch.setattr(sandbox_child, "_libc", libc)
    monkeypatch.setattr(os, "getuid", lambda: user)
    with pytest.raises(PermissionError, match="unshare: Operation not permitted"):
        sandbox_child._apart()
    ((name, (flags,)),) = libc.calls
    assert name == "unshare" and flags & 0x10000000 == own
    for namespace in (0x20000, 0x8000000, 0x20000000, 0x40000000):  # mounts, IPC, processes, network
        assert flags & namespace


def test_all_is_read_only_before_the_one_folder_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    monkeypatch.setattr(sandbox_child, "_libc", libc)
    monkeypatch.chdir(tmp_path)
    sandbox_child._furnish(str(tmp_path), 4096)
    order = [(name, words[1]) if name == "mount" else (name, None) for name, words in libc.calls]
    folder, python = str(tmp_path).encode(), b"python"
    assert order == [
        ("mount", b"/"),
        ("mount", b"/proc"),
        ("syscall", None),
        ("mount", folder),
        ("mount", python),
    ]
    assert libc.calls[3][1][4] == b"size=4096,mode=777"
    assert Path.cwd() == tmp_path and (tmp_path / "python").is_dir()


def test_limits_are_those_asked_for_and_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: found.update({what: limits}))
    sandbox_child._limit(ASKED)
    assert all(soft == hard for soft, hard in found.values())
    assert {what: soft for what, (soft, _) in found.items()} == {
        resource.RLIMIT_AS: 1 << 28,
        resource.RLIMIT_CPU: 7,
        resource.RLIMIT_NPROC: 8,
        resource.RLIMIT_FSIZE: 99,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }


def test_rights_are_given_up_for_good_and_it_dies_with_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    libc, changed = Libc(), list[tuple[Any, ...]]()
    monkeypatch.setattr(sandbox_child, "_libc", libc)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *words, name=name: changed.append((name, *words)))
    sandbox_child._nobody()
    nobody = (65534,) * 3
    assert changed == [("setgroups", []), ("setresgid", *nobody), ("setresuid", *nobody)]
    assert [words[:2] for _, words in libc.calls] == [(1, 9), (38, 1)]
