"""A run without Prefect: a process of its own, which goes on when whoever started it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soppu.progress.events import DONE, FAILED, FILE, Reader
from soppu.progress.followed import Followed


class HereRun:
    """The pipeline in a process of this machine.

    Args:
        config: the TOML file.
        overrides: `{"section.key": value}`, stronger than the file.
        runs: folder of runs, where the run's own will be.
    """

    def __init__(self, config: Path, overrides: Mapping[str, Any], *, runs: Path) -> None:
        self.id, self._runs, self._started = uuid.uuid4().hex, runs, time.time()
        self.log = runs / ".logs" / f"{self.id[:12]}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._followed: Followed | None = None
        command = [sys.executable, "-m", "soppu.stages.pipeline", str(config), json.dumps(dict(overrides))]
        with self.log.open("xb") as log:
            self._process = subprocess.Popen(
                [*command, self.id], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def folder(self) -> Path | None:
        """The run's folder, once there is one."""
        return self._followed.folder if self._followed else None

    def look(self) -> Followed | None:
        """What follows the run's folder, once there is one."""
        if self._followed is None:
            for path in self._runs.glob(f"[!.]*/{FILE}"):
                recent = not path.parent.is_symlink() and path.stat().st_mtime >= self._started - 1.0
                if recent and any(event.of == self.id for event in Reader(path).read()):
                    self._followed = Followed(path.parent, of=self.id)
        return self._followed

    def over(self) -> tuple[str, str]:
        """Whether the process has ended: "done", or "failed" and the last it said; else empty strings."""
        code = self._process.poll()
        if code is None:
            return "", ""
        said = self.log.read_text(errors="replace").strip().splitlines()
        return (
            (DONE, "") if code == 0 else (FAILED, f"{said[-1] if said else f'exit code {code}'} ({self.log})")
        )

    def waiting(self) -> str:
        """What to say of it as long as its stages say nothing."""
        return "reading configuration, model and text"
