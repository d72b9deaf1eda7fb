"""An adapter on the wire as signs and gains: ComPEFT, as `soppu.compress.numbers.ternary.fixed` repairs it.

One array record holds it as two tensors; a tensor each for every module would cost more in headers than in
signs. Modules come in the order of their names:

    ternary.signs   uint8 (b,): r byte strings as `streams.join` puts them together. The j-th is a `golomb`
                    stream of the j-th component of every module that has one: b_j (o,), then a_j (i,)
    ternary.gains   float32 (g,): min(r, o, i) gains of every module

Components are in the order of their singular values, so those of one stream keep a like share of their
signs, which one Golomb code fits: on three published GPT-2 adapters a single stream is 15 % larger at a
density of 20 %, and 79 % at 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from soppu.adapter import LoraAdapter
from soppu.compress.codec import golomb, streams
from soppu.compress.numbers import ternary
from soppu.compress.numbers.ternary import Ternary
from soppu.errors import AdapterError, BundleError

SIGNS, GAINS = "ternary.signs", "ternary.gains"


def to_ternary(adapter: LoraAdapter, *, density: float) -> dict[str, Tensor]:
    """Adapter -> signs (b,) uint8 and gains (g,) float32. O((o + i) r (r + log(o + i))) a module.

    Args:
        density: share of the adapter's numbers to keep, at most; above 0, at most 1.

    Raises:
        ConfigError: a density out of range.
        AdapterError: no tensors, shapes that do not fit, NaN or Inf.
    """
    made = ternary.fixed(adapter, density=density)
    ordered = [made[name] for name in sorted(made)]
    signs = streams.join([golomb.encode(part.cpu().numpy()) for part in _components(ordered)])
    return {
        SIGNS: torch.frombuffer(bytearray(signs), dtype=torch.uint8),
        GAINS: torch.cat([part.gain for part in ordered]),
    }


def from_ternary(
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    who: str,
    base_model: str = "",
    base_hash: str = "",
    fan_in_fan_out: bool = False,
) -> LoraAdapter:
    """Signs and gains -> adapter of float32 pairs, of rank min(rank, o, i) each. O((o + i) r) a module.

    Safe on any tensors: nothing is made that the plan and the length of the signs do not call for.

    Args:
        expected: full-model name -> (o, i) of every module that is in there.
        rank: the LoRA rank agreed on.
        who: the sender, named in the message.

    Raises:
        AdapterError: a missing or unknown tensor, a wrong shape or kind of number, a gain of NaN or Inf, or
            signs that are damaged or not as many as the plan says.
    """
    if state.keys() != {SIGNS, GAINS}:
        found = ", ".join(sorted(state)) or "nothing"
        raise AdapterError(f"{who}: a ternary adapter of {found}; expected {GAINS}, {SIGNS}")
    ranks = {name: min(rank, *expected[name]) for name in sorted(expected)}
    gains = _gains(state[GAINS], sum(ranks.values()), who).split(list(ranks.values()))
    try:
        sides = _sides(_signs(state[SIGNS], who), expected, ranks=ranks, source=f"{who}: {SIGNS}")
    except BundleError as error:
        raise AdapterError(str(error)) from error
    pairs = {
        name: Ternary(B=torch.stack(B, 1), A=torch.stack(A), gain=gain).pair()
        for (name, (B, A)), gain in zip(sides.items(), gains, strict=True)
    }
    return LoraAdapter({name: pairs[name] for name in expected}, base_model, base_hash, fan_in_fan_out)


def _components(ordered: list[Ternary]) -> Iterator[Tensor]:
    """The j-th columns of B and rows of A of all modules in a row, for every j."""
    for j in range(max(len(part.gain) for part in ordered)):
        yield torch.cat(
            [side for part in ordered if j < len(part.gain) for side in (part.B[:, j], part.A[j])]
        )


def _gains(gains: Tensor, count: int, who: str) -> Tensor:
    if gains.dtype != torch.float32 or tuple(gains.shape) != (count,):
        raise AdapterError(
            f"{who}: {GAINS}: {gains.dtype} {tuple(gains.shape)}, the plan says torch.float32 {(count,)}"
        )
    if not bool(torch.isfinite(gains).all()):
        raise AdapterError(f"{who}: {GAINS}: holds NaN or Inf")
    return gains


def _signs(signs: Tensor, who: str) -> bytes:
    if signs.dtype != torch.uint8 or signs.ndim != 1:
        raise AdapterError(
            f"{who}: {SIGNS}: {signs.dtype} {tuple(signs.shape)}, expected torch.uint8 of one dimension"
        )
    return signs.numpy().tobytes()


def _sides(
    data: bytes, expected: Mapping[str, tuple[int, int]], *, ranks: Mapping[str, int], source: str
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Module -> the columns of B and the rows of A, int8, out of the joined streams."""
    sides: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in ranks}
    for j, stream in enumerate(streams.split(data, count=max(ranks.values()), source=source)):
        there = [name for name in ranks if j < ranks[name]]
        lengths = [length for name in there for length in expected[name]]
        values = golomb.decode(stream, size=sum(lengths), source=f"{source}: stream {j}")
        parts = torch.from_numpy(values).split(lengths)
        for name, column, row in zip(there, parts[::2], parts[1::2], strict=True):
            sides[name][0].append(column)
            sides[name][1].append(row)
    return sides
