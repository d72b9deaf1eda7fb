"""How good a user's adapters are on the user's own text, on the emulator. Numbers leave this node, no text.

Knows nothing of Flower.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clients.workbench import Workbench
from soppu.federation import wire
from soppu.federation.train import mean_loss

COLUMNS = ("base", "shared", "personal", "compressed")
EXAMPLES = "num-examples"


def measure(bench: Workbench, user_id: str, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Held-out losses, nats a token, under `loss-COLUMN` for every column that came, and base.

    Args:
        state: adapters in wire names, each below a prefix that is its column: `personal/model.layers…`.
    """
    held = bench.heldout(user_id)
    numbers: dict[str, float] = {EXAMPLES: len(held)}
    for column in COLUMNS:
        prefix = f"{column}/"
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if part or column == COLUMNS[0]:
            adapter = wire.loose_from_state(part, base_hash=bench.plan.base_hash) if part else None
            numbers[f"loss-{column}"] = mean_loss(bench.top, bench.plan, held, adapter=adapter)
    return numbers
