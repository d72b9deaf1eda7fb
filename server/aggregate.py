"""The mean of what users share, by the rule that the configuration names. No files, no messages.

The rules are Flower's own (FedAvg, FedTrimmedAvg, which cut to its middle is FedMedian, and Krum), run on the
changes of a round: they move with their input, so nothing else differs, and small changes of large numbers
keep their digits. The mean of products is ours: Flower averages tensors, and B A is never one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.supercore.differential_privacy import add_gaussian_noise_inplace, compute_stdv
from torch import Tensor

from soppu.adapter import LoraPair
from soppu.sharing import SharingSettings

State = Mapping[str, Tensor]
_A, _B = ".lora_A.weight", ".lora_B.weight"
_CHANGE, _WEIGHT = "change", "weight"
_NOTHING = 1e-6  # a singular value below this share of the largest is rounding


@dataclass(frozen=True, eq=False)
class Reply:
    """What one user sent: tensors, and how many examples they were trained on."""

    state: State
    examples: int


def averaged(
    start: State, replies: Mapping[str, Reply], how: SharingSettings
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(Tensors that the next round begins with, user -> factor on the change of who was clipped).

    Cost: a copy of every reply, in float32.

    Args:
        start: what the round began with, the same names and shapes as every reply.
        replies: by user, at least one; summed in the order of names.
    """
    users = sorted(replies)
    factors = _factors({user: _distance(start, replies[user].state) for user in users}, how)
    changes = [_change(start, replies[user].state, factors.get(user, 1.0)) for user in users]
    # one user moves a noised mean by no more than the norm over how many they are: all weigh the same
    weights = [1 if how.noisy_average else replies[user].examples for user in users]
    if how.average == "products":
        return _products(start, changes, weights), factors
    mean = _RULES[how.robust](changes, weights, _hostile(how.robust_share, len(users)))
    following = {name: tensor.float() + mean[name] for name, tensor in start.items()}
    if how.noisy_average:
        noise = compute_stdv(how.dp_noise, how.dp_clip, len(users))
        add_gaussian_noise_inplace([tensor.numpy() for tensor in following.values()], noise)
    return following, factors


def refit(pairs: Sequence[LoraPair], weights: Sequence[float], *, otherwise: LoraPair) -> LoraPair:
    """The best pair of the rank of `otherwise` for sum_u w_u B_u A_u, its factors of equal size.

    The products are never formed: QR of the stacked B and A, and the SVD of what is between. Cost
    O((o + i) (n r)^2). A component that the sum does not have keeps its row of A of `otherwise` and gets a
    column of zeros in B: it changes nothing, and can be trained on.
    """
    left = torch.cat([w * pair.B.double() for w, pair in zip(weights, pairs, strict=True)], 1)
    right = torch.cat([pair.A.double() for pair in pairs], 0)
    (Q, R), (P, S) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, sizes, V = torch.linalg.svd(R @ S.T)
    A, B = otherwise.A.clone().float(), torch.zeros_like(otherwise.B).float()
    rank = min(otherwise.rank, int((sizes > _NOTHING * sizes[0]).sum()))
    root = sizes[:rank].sqrt()
    A[:rank] = (root[:, None] * (P @ V[:rank].T).T).float()
    B[:, :rank] = ((Q @ U[:, :rank]) * root).float()
    return LoraPair(A, B)


def _factors(sizes: Mapping[str, float], how: SharingSettings) -> dict[str, float]:
    """User -> by how much a change beyond the limit is made smaller."""
    limits = [how.dp_clip] if how.noisy_average else []
    if how.clip:
        limits += [statistics.median_low(sizes.values()) if how.clip == "median" else float(how.clip)]
    limit = min(limits, default=math.inf)
    return {user: limit / size for user, size in sizes.items() if size > limit}


def _distance(start: State, state: State) -> float:
    squares = ((tensor.double() - start[name].double()).square().sum() for name, tensor in state.items())
    return math.sqrt(sum(map(float, squares)))


def _change(start: State, state: State, factor: float) -> dict[str, Tensor]:
    return {name: factor * (tensor.float() - start[name].float()) for name, tensor in state.items()}


def _products(start: State, changes: Sequence[State], weights: Sequence[int]) -> dict[str, Tensor]:
    shares = [weight / sum(weights) for weight in weights]
    mean: dict[str, Tensor] = {}
    for name in (key.removesuffix(_A) for key in start if key.endswith(_A)):
        pairs = [
            LoraPair(start[name + _A] + change[name + _A], start[name + _B] + change[name + _B])
            for change in changes
        ]
        pair = refit(pairs, shares, otherwise=LoraPair(start[name + _A], start[name + _B]))
        mean |= {name + _A: pair.A, name + _B: pair.B}
    return {name: mean[name] for name in start}


def _mean(changes: Sequence[State], weights: Sequence[int], hostile: int) -> State:
    return aggregate_arrayrecords(_records(changes, weights), _WEIGHT).to_torch_state_dict()


def _trimmed(changes: Sequence[State], weights: Sequence[int], hostile: int) -> State:
    """Without the `hostile` largest and smallest of every number; one tensor of all users at a time."""
    cut = (hostile + 0.25) / len(
        changes
    )  # it takes a share and rounds down: this many, whatever a float does
    return {
        name: torch.as_tensor(trim_mean(torch.stack([change[name] for change in changes]).numpy(), cut))
        for name in changes[0]
    }


def _median(changes: Sequence[State], weights: Sequence[int], hostile: int) -> State:
    """What is left when all but the middle one, or two, are cut off."""
    return _trimmed(changes, weights, (len(changes) - 1) // 2)


def _krum(changes: Sequence[State], weights: Sequence[int], hostile: int) -> State:
    (chosen,) = select_multikrum(_records(changes, weights), hostile, 1)
    return chosen.array_records[_CHANGE].to_torch_state_dict()


_RULES: dict[str, Callable[[Sequence[State], Sequence[int], int], State]] = {
    "mean": _mean,
    "trimmed": _trimmed,
    "median": _median,
    "krum": _krum,
}


def _hostile(share: float, users: int) -> int:
    """How many users may be hostile: the share of them, rounded up, and never half."""
    return min(math.ceil(share * users - 1e-9), (users - 1) // 2)


def _records(changes: Sequence[State], weights: Sequence[int]) -> list[RecordDict]:
    return [
        RecordDict({_CHANGE: ArrayRecord(dict(change)), _WEIGHT: MetricRecord({_WEIGHT: weight})})
        for change, weight in zip(changes, weights, strict=True)
    ]
