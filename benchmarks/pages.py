"""What all page writers do: read a result file, word it in Markdown, put that between a page's marks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from soppu.files import write_text


def read_result(name: str) -> dict[str, Any]:
    """A result file; empty where there is none."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def circumstances_line(found: Mapping[str, Any]) -> str:
    """Where and of what commit a result is, in one line."""
    where = f"Measured on {found['hardware']}; GPU: {found['gpu']}"
    return f"{where}; commit `{found['commit'][:12]}`, seed {found['seed']}."


def with_blocks(page: str, made: Mapping[str, str]) -> str:
    """The page with the text between its marks replaced; a mark without a result stays as it is."""

    def put(match: re.Match[str]) -> str:
        text = made.get(match["name"])
        return (
            match[0]
            if text is None
            else f"<!-- {match['name']}:begin -->\n{text}\n<!-- {match['name']}:end -->"
        )

    return re.sub(r"<!-- (?P<name>[\w-]+):begin -->\n.*?<!-- (?P=name):end -->", put, page, flags=re.S)


def fill(made: Mapping[str, str], *pages: Path) -> None:
    """Write the pages anew with what was made between their marks, each atomically."""
    for page in pages:
        write_text(page, with_blocks(page.read_text(), made))
