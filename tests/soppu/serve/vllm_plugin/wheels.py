"""Sources of vLLM's wheels, neither downloaded whole nor installed: single files, read by ranges, kept."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).parents[4]
KEPT = ROOT / ".soppu" / "wheels"
_BLOCK = 1 << 20


class _Remote(io.RawIOBase):
    """A file that a server gives out by ranges; each block is asked for once."""

    def __init__(self, url: str) -> None:
        self._session, self._url, self._at = requests.Session(), url, 0
        head = self._session.head(url, timeout=30, allow_redirects=True)
        head.raise_for_status()
        self._size = int(head.headers["content-length"])
        self._block = functools.cache(self._fetched)

    def _fetched(self, number: int) -> bytes:
        first, last = number * _BLOCK, min(self._size, (number + 1) * _BLOCK) - 1
        headers = {"Range": f"bytes={first}-{last}"}
        answer = self._session.get(self._url, headers=headers, timeout=60)
        answer.raise_for_status()
        assert answer.status_code == 206, "the server gives out no ranges"
        return answer.content

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        number, inside = divmod(self._at, _BLOCK)
        piece = self._block(number)[inside : inside + len(buffer)] if self._at < self._size else b""
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Wheel:
    """The sources of one vLLM. Skips the test, saying why, where the package index cannot be reached."""

    def __init__(self, version: str) -> None:
        self.version, self._folder = version, KEPT / f"vllm-{version}"

    def source(self, module: str) -> str:
        """The text of a module; "" if there is none."""
        path = self._folder / f"{module}.py"
        if not path.exists():
            names = set(self._archive.namelist())
            stem = module.replace(".", "/")
            inside = next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in names), "")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._archive.read(inside).decode() if inside else "")
        return path.read_text()

    @functools.cached_property
    def _archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(io.BufferedReader(_Remote(self._url()), _BLOCK))  # type: ignore[arg-type]
        except requests.RequestException as error:
            pytest.skip(f"the wheel of vLLM {self.version} cannot be read from here: {error}")

    def _url(self) -> str:
        """Where pip would download it from."""
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "install", *options, "--report", "-", f"vllm=={self.version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip ended without a word"])[-1]
            pytest.skip(f"no wheel of vLLM {self.version} is known here: {why}")
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
