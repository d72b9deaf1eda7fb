"""In what form a trained adapter leaves its user: float32 tensors, or ternary where that costs little enough.

What a form costs is measured on the user's own validation text, on the emulator. Knows nothing of Flower.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.workbench import UserStates, Workbench
from soppu.adapter import LoraAdapter
from soppu.federation import wire, wire_ternary
from soppu.federation.train import mean_loss


@dataclass(frozen=True, eq=False)
class Parcel:
    """What is sent.

    Attributes:
        form: wire.FLOAT32 or wire.TERNARY.
        state: the tensors of that form.
        loss: validation loss of the adapter as trained, nats a token.
        ternary_loss: that of its ternary form, sent or not; None where none was asked for.
    """

    form: str
    state: dict[str, Tensor]
    loss: float
    ternary_loss: float | None = None


def pack(
    bench: Workbench, states: UserStates, adapter: LoraAdapter, *, loss: float, personal: bool
) -> Parcel:
    """Choose the form by `[federation]` of the bench's configuration.

    A shared round is averaged and always float32. In the personal one the ternary form is sent if the
    validation loss of what the server will decode rises by no more than `wire_max_loss`.

    Args:
        loss: validation loss of the adapter, nats a token.

    Raises:
        AdapterError: the adapter holds NaN or Inf.
    """
    settings = bench.config.federation
    if not personal or settings.wire != wire.TERNARY:
        return Parcel(wire.FLOAT32, wire.to_state(adapter), loss)
    state = wire_ternary.to_ternary(adapter, density=settings.wire_density)
    decoded = wire_ternary.from_ternary(
        state,
        bench.shapes,
        rank=bench.config.lora.rank,
        who=states.user.user_id,
        base_hash=bench.plan.base_hash,
        fan_in_fan_out=bench.plan.fan_in_fan_out,
    )
    after = mean_loss(bench.top, bench.plan, states.validation, adapter=decoded)
    if after - loss <= settings.wire_max_loss:
        return Parcel(wire.TERNARY, state, loss, after)
    return Parcel(wire.FLOAT32, wire.to_state(adapter), loss, after)
