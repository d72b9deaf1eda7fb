"""Runs one program apart from the machine. A script of its own, started by `sandbox`; it knows Python alone.

In order: new namespaces, a root that cannot be written, a folder in memory, a user, limits, the program.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

REFUSED = 3  # exit status: the program was not started
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _BIND, _NOSUID_NODEV = 0x44000, 0x5000, 0x6  # the first two with MS_REC
_MOUNT_SETATTR, _RECURSIVE, _READ_ONLY, _HERE = 442, 0x8000, 0x1, -100
_NOBODY = 65534
_PYTHON = "python"
_STATUS = 3  # the descriptor that says the program came to its end
_HARNESS = """import os
with open("program.py") as file:
    exec(compile(file.read(), "program.py", "exec"), {{"__name__": "__main__"}})
os.write({status}, b"{word}")
"""
_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _apart() -> None:
    """Namespaces of this process and its children; who is not root needs one of users first."""
    user, group = os.getuid(), os.getgid()
    flags = _NEWNS | _NEWIPC | _NEWPID | _NEWNET | (_NEWUSER if user else 0)
    _call("unshare", _libc.unshare(flags))
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _furnish(folder: str, size: int) -> None:
    """Everything read-only but a folder in memory, and only own processes in /proc. In the new namespaces."""
    _call("mount /", _libc.mount(b"none", b"/", None, _PRIVATE, None))
    _call("mount /proc", _libc.mount(b"proc", b"/proc", b"proc", _NOSUID_NODEV, None))
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    done = _libc.syscall(_MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, ctypes.sizeof(attributes))
    _call("read-only /", done)
    options = f"size={size},mode=777".encode()
    _call("mount tmpfs", _libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _NOSUID_NODEV, options))
    os.chdir(folder)
    os.mkdir(_PYTHON)  # by another name: whoever runs the program need not be let in where it lies
    _call("bind Python", _libc.mount(sys.base_prefix.encode(), _PYTHON.encode(), None, _BIND, None))


def _nobody() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its starter
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def _limit(asked: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: asked["memory"],
        resource.RLIMIT_CPU: asked["seconds"] + 1,
        resource.RLIMIT_NPROC: asked["processes"],
        resource.RLIMIT_FSIZE: asked["files"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (int(most), int(most)))


def _start(asked: dict[str, Any]) -> None:
    """Become the program. Never returns."""
    _furnish(asked["folder"], asked["files"])
    for name, text in (
        ("program.py", asked["program"]),
        ("harness.py", _HARNESS.format(status=_STATUS, word=asked["word"])),
    ):
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    os.dup2(1, _STATUS)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.set_inheritable(_STATUS, True)  # all others close: Python opens none that would be handed on
    _nobody()
    _limit(asked)
    python = os.path.join(_PYTHON, os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix))
    os.execve(python, [os.path.abspath(python), "-I", "-S", "-B", "harness.py"], {})


def main() -> int:
    """Start what standard input asks for, and wait for its end."""
    asked = json.loads(sys.stdin.buffer.read())
    for _ in range(_STATUS - 2):  # whose numbers are then not taken
        os.open(os.devnull, os.O_RDONLY)
    read, write = os.pipe()
    try:
        _apart()
        child = os.fork()  # the first of the new process namespace: all others end with it
        if not child:
            try:
                _start(asked)
            except BaseException as error:
                os.write(write, str(error).encode())
            os._exit(REFUSED)
        os.close(write)
        refused = os.read(read, 1000).decode()  # closed by exec
        os.waitpid(child, 0)
    except OSError as error:
        refused = str(error)
    if refused:
        sys.stderr.write(refused)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
