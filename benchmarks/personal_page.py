"""The table of users trained together, from benchmarks/results/batched.json to docs/personal.md.

python -m benchmarks.personal_page
"""

from __future__ import annotations

from typing import Any

from benchmarks.pages import circumstances_line, fill, markdown, read_result
from benchmarks.record import ROOT

PAGE = ROOT / "docs" / "personal.md"
_NAMES = {"tiny": "random model of width 32, two layers", "smollm2": "last four layers of SmolLM2-135M"}


def blocks() -> dict[str, str]:
    """Name of a mark -> the Markdown that stands there; a result that is not there leaves its mark alone."""
    found = read_result("batched")
    return {"batched": f"{_table(found)}\n\n{circumstances_line(found)}"} if found else {}


def _table(found: dict[str, Any]) -> str:
    head = ["trained", "users", "core", "user-steps a second, one by one", "at once", "ratio", "losses apart"]
    rows = [
        [
            _NAMES[name],
            str(one["users"]),
            " x ".join(map(str, one["core"])),
            f"{one['user_steps_a_second_one_by_one']:.1f}",
            f"{one['user_steps_a_second']:.1f}",
            f"{one['ratio']:.1f}",
            f"{one['max_loss_difference']:.1e}",
        ]
        for name, one in found["sizes"].items()
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    fill(blocks(), PAGE)
