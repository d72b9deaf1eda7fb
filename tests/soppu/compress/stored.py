"""Files of format 2 that earlier code wrote, one or more of every method, and the numbers they held then."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from soppu.compress import Bundle

SAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "format_2.json").read_text()
)


def data(kind: str) -> bytes:
    """The bytes of a stored file."""
    return base64.b64decode(SAMPLES[kind]["file"])


def bundle(kind: str) -> Bundle:
    """A stored file, read."""
    return Bundle.from_bytes(data(kind), source=kind)
