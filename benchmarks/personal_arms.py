"""The arms of the study: what a user has of their own, where it begins, and which arms are measured first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.personal_ground import COHORT, FIRST, FIRST_OF_FEW, RANK, Ground
from benchmarks.personal_learnt import federated, learnt
from benchmarks.personal_ways import InLoop, InPeft, Way, of_core, only_b, whole
from soppu.adapter import LoraAdapter, LoraPair
from soppu.cores import core as cores
from soppu.cores.basis import CoreBasis
from soppu.cores.core import CoreInBasis
from soppu.cores.projecting import from_lora
from soppu.federation import wire
from soppu.federation.attach import initial_pairs

BASE, SHARED, MORE, FULL, LORA = "base", "shared", "shared, as many steps", "full LoRA", "LoRA"
CORE, BESIDE, MEAN, PROJECTED = "core", "core beside shared", "mean core", "full LoRA, projected"
RANDOM, WEIGHTS, FEDSB, FEDSA = "random basis", "basis of the weights", "Fed-SB", "FedSA"
LEARNT, FEDERATED = "learnt basis", "federated basis"  # the cohort's text in one place; where it is
OURS = (CORE, BESIDE, LEARNT, FEDERATED)
DOWN = ("down_proj",)  # the one projection where a user's own numbers are best spent
TRAINED_FOR_ALL = (MORE, FEDSB)  # on the cohort's pooled text: nothing is a user's own
NOT_TRAINED = (BASE, SHARED, MEAN, PROJECTED)


@dataclass(frozen=True)
class Arm:
    """One arm in one setting."""

    name: str
    k: int = 0  # of the core
    own: int = 0  # rank of the user's own beside
    basis_users: int = 0  # who the basis is of; 0 where there is none, or none of users
    modules: tuple[str, ...] = ()  # projections that are trained; all those of the LoRA if empty

    def __str__(self) -> str:
        parts = [f"k={self.k}" if self.k else "", f"own {self.own}" if self.own else ""]
        parts += [f"on {', '.join(self.modules)}" if self.modules else ""]
        parts += [f"{self.basis_users} users" if self.basis_users not in (0, COHORT) else ""]
        return " ".join([self.name, *filter(None, parts)])


def ours(k: int, own: int = 0, *, users: int = COHORT, name: str = CORE) -> Arm:
    """A core in the cohort's basis."""
    return Arm(name, k, own, users)


def beside(k: int, own: int = 0, *, users: int = COHORT) -> Arm:
    """A core beside the shared adapter, in the basis of what the cohort has beside it."""
    return ours(k, own, users=users, name=BESIDE)


def on_down(name: str, k: int = 0, own: int = 0, *, users: int = COHORT) -> Arm:
    """Numbers for the down projections alone."""
    return Arm(name, k, own, users if name in OURS else 0, DOWN)


_FIRST = (
    *(Arm(BASE), Arm(SHARED), Arm(FULL), Arm(MORE)),
    *(on_down(FEDERATED, k) for k in (64, 32)),
    *(on_down(RANDOM, k) for k in (64, 32)),
    on_down(LORA, own=1),
)
_EQUAL_NUMBERS = (
    *(on_down(FEDERATED, 16), on_down(RANDOM, 16), on_down(WEIGHTS, 64), on_down(WEIGHTS, 32)),
    *(Arm(FEDSA), Arm(FEDSB, 32), ours(32, name=MEAN)),
    *(ours(k, name=PROJECTED) for k in (64, 32, 16)),
    *(Arm("unilora", 16384), Arm("vera", 256), Arm("tinylora", 1024)),
    on_down(FEDERATED, 54),  # as many numbers as vera's
    *(on_down(FEDERATED, 8), on_down(RANDOM, 8), on_down(WEIGHTS, 16)),
)
_MORE_OF_OURS = (
    *(on_down(FEDERATED, 32, own) for own in (1, 2, 4)),
    *(on_down(FEDERATED, 32, users=users) for users in (12, 48, 6)),
)
_ELSEWHERE = (
    *(Arm(LORA, own=1), on_down(LORA, own=2), on_down(LORA, own=8), Arm("tinylora", 64)),
    *(on_down(LEARNT, 64), on_down(LEARNT, 32), beside(32), ours(32)),
)
BLOCKS: tuple[tuple[Arm, ...], ...] = (_FIRST, _EQUAL_NUMBERS, _MORE_OF_OURS, _ELSEWHERE)


def way_of(arm: Arm, ground: Ground) -> Way:
    """How users are trained in an arm that trains."""
    if arm.name in _PEFT:
        return InPeft(ground.exact_beside(), _PEFT[arm.name](arm, ground), seed=ground.seed)
    if arm.name in (FULL, MORE):
        return ground.full()
    if arm.name == FEDSA:
        return InLoop(ground.plain, ground.shared, only_b, held=(RANK, 0), seed=ground.seed)
    if arm.name == LORA:
        return InLoop(ground.beside, _fresh_lora(ground, arm), whole, seed=ground.seed)
    start = start_of(arm, ground)
    return InLoop(ground.plain if arm.name == CORE else ground.beside, start, of_core, seed=ground.seed)


def _fresh_lora(ground: Ground, arm: Arm) -> LoraAdapter:
    pairs = initial_pairs(ground.base.shapes(arm.modules), rank=arm.own, seed=ground.seed + 1)
    return LoraAdapter(pairs, base_hash=ground.base.hash)


def start_of(arm: Arm, ground: Ground) -> CoreInBasis:
    """Where a core begins: at the shared adapter as far as the basis can tell it, or at nothing beside it."""
    basis = basis_of(arm, ground)
    core = from_lora(ground.shared, basis).core if arm.name == CORE else cores.zero(basis)
    if arm.own:
        core = replace(core, own=initial_pairs(basis.module_shapes(), rank=arm.own, seed=ground.seed + 1))
    return CoreInBasis(core, basis)


def core_of(arm: Arm, ground: Ground, held: Mapping[str, Tensor]) -> CoreInBasis:
    """The numbers that a user sent in an arm of cores, as the core that they were trained as."""
    start = start_of(arm, ground)
    cores_ = {name: held[f"{name}.core"] for name in start.core.cores}
    own = {name: LoraPair(held[f"{name}.own_A"], held[f"{name}.own_B"]) for name in start.core.own}
    return replace(start, core=replace(start.core, cores=cores_, own=own))


def basis_of(arm: Arm, ground: Ground) -> CoreBasis:
    """The basis that an arm's cores are told in."""
    if arm.name == RANDOM:
        return ground.drawn(arm.k, arm.modules)
    if arm.name == LEARNT:
        return learnt(ground, arm.k, arm.modules, arm.basis_users)
    if arm.name == FEDERATED:
        return federated(ground, arm.k, arm.modules, arm.basis_users)
    if arm.name in (WEIGHTS, FEDSB):
        return _of_weights(arm, ground)
    whole_basis = ground.basis(arm.k, arm.basis_users, beside=arm.name == BESIDE)
    chosen = ground.base.shapes(arm.modules)
    return replace(whole_basis, sides={name: whole_basis.sides[name] for name in chosen})


def _of_weights(arm: Arm, ground: Ground) -> CoreBasis:
    """The leading singular directions of the weights themselves, as LoRA-XS takes them."""
    sides, k = {}, arm.k
    for name, weight in ground.base.weights(arm.modules):
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        sides[name] = u[:, :k].contiguous(), vt[:k].mT.contiguous()
    return CoreBasis(sides, base_hash=ground.base.hash)


def first_rates(arm: Arm) -> tuple[float, ...]:
    """Step sizes that are tried whatever they come to."""
    return FIRST_OF_FEW if arm.modules and arm.k else FIRST


def bytes_down(arm: Arm, ground: Ground) -> dict[str, Tensor]:
    """What a user is given before training: the shared adapter, and a basis that no seed or weight gives."""
    given = {} if arm.name in (BASE, CORE, PROJECTED, MEAN) else wire.to_state(ground.shared)
    if arm.basis_users:
        basis = basis_of(arm, ground)
        given |= {
            f"{name}.{side}": t
            for name, both in basis.sides.items()
            for side, t in zip("UV", both, strict=True)
        }
    if arm.name == FEDSB:
        given |= start_of(arm, ground).core.tensors()
    if arm.name == CORE:
        given |= {
            f"{name}.core": core for name, core in start_of(replace(arm, own=0), ground).core.cores.items()
        }
    return given


def mean_core(arm: Arm, ground: Ground) -> LoraAdapter:
    """The mean of the cohort's adapters inside their basis."""
    basis = basis_of(arm, ground)
    held = [from_lora(one, basis).core.cores for one in ground.adapters(arm.basis_users).values()]
    mean = {name: torch.stack([one[name] for one in held]).mean(0) for name in basis.sides}
    return CoreInBasis(replace(cores.zero(basis), cores=mean), basis).to_lora()


def _targets(ground: Ground) -> dict[str, Any]:
    return {"target_modules": list(ground.base.plan.target_modules)}


def _unilora(arm: Arm, ground: Ground) -> Any:
    from peft import UniLoraConfig

    return UniLoraConfig(r=4, theta_d_length=arm.k, proj_seed=ground.seed, **_targets(ground))


def _vera(arm: Arm, ground: Ground) -> Any:
    from peft import VeraConfig

    return VeraConfig(r=arm.k, projection_prng_key=ground.seed, **_targets(ground))


def _tinylora(arm: Arm, ground: Ground) -> Any:
    from peft import TinyLoraConfig

    rank = 8 if arm.k <= 64 else 32  # at most as many numbers as its rank x rank core has
    return TinyLoraConfig(r=rank, u=arm.k, projection_seed=ground.seed, **_targets(ground))


_PEFT: Mapping[str, Callable[[Arm, Ground], Any]] = {
    "unilora": _unilora,
    "vera": _vera,
    "tinylora": _tinylora,
}
