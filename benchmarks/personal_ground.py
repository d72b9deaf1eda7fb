"""What every arm of the study begins with: models, texts, the shared adapter, the cohort's adapters, bases.

All of it is made once and lies in a folder that git ignores; from the same seed and text it is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save

from benchmarks.personal_users import (
    CORPORA,
    PACKAGES,
    Person,
    Roles,
    Sizes,
    Text,
    Texts,
    Words,
    digest,
    roles,
)
from benchmarks.personal_ways import B_RATIO, BATCH, Blocks, InLoop, Model, Way, whole
from benchmarks.record import ROOT
from soppu import files, models
from soppu.adapter import LoraAdapter, LoraPair
from soppu.compress import CompressOptions, compress
from soppu.compress.joining import basis_of
from soppu.cores import basis as bases
from soppu.cores.basis import CoreBasis
from soppu.federation import emulator, wire
from soppu.federation.attach import initial_pairs

RANK, LAYERS = 8, 4
MARKS = (10, 20, 30, 45, 60)  # steps after which a tuning is looked at; the best number is taken
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # step sizes of A; B and cores take twice as much
GIVEN_UP = 0.2  # nats a token above the best so far: a step size as bad as that is not gone on with
RISEN = 0.005  # likewise one that has become worse by as much
FIRST = (1e-3, 3e-3, 1e-2)  # tried first; while the best is the first or last, one beyond it is
FIRST_OF_FEW = (1e-2, 3e-2, 1e-1)  # likewise for cores of few modules, whose best is higher
_SHARED_RATES, _SHARED_EVERY, _SHARED_MOST, _SHARED_BATCH = (3e-3, 1e-3, 3e-4), 40, 160, 8
OTHERS = 16_384  # tokens that are in no training text, drawn for the head that is trained through
DTYPES = ("bfloat16", "float32")  # of the layers, in training: the second where a processor lacks the first
COHORT = 24  # users whose text the shared adapter is trained on
SETTINGS: Mapping[str, Any] = {
    "edition": 5,  # to be raised where code changes what comes out
    "rank": RANK,
    "adapter_layers": LAYERS,
    "batch": BATCH,
    "b_ratio": B_RATIO,
    "steps": MARKS,
    "step_sizes": FIRST,
    "given_up": GIVEN_UP,
    "risen": RISEN,
    "cohort": COHORT,
    "others": OTHERS,
    "shared": {"step_sizes": _SHARED_RATES, "steps": _SHARED_MOST, "batch": _SHARED_BATCH},
}


@dataclass(frozen=True)
class Tuned:
    """What an arm does best with, on users who are not reported."""

    rate: float
    steps: int
    tried: Mapping[str, float]  # "rate, steps" -> mean loss of these users

    def to_dict(self) -> dict[str, Any]:
        """As it is written down."""
        return {"step_size": self.rate, "steps": self.steps, "tried": dict(self.tried)}


class Ground:
    """One corpus.

    Args:
        base: the states of its frozen layers are kept in their dtype; users are judged in float32.
        folder: for what takes long to make; named by the digest of everything it is made of.
    """

    def __init__(
        self,
        corpus: str,
        sizes: Sizes,
        base: Base,
        *,
        folder: Path,
        seed: int = 0,
        marks: Sequence[int] = MARKS,
    ) -> None:
        self.corpus, self.sizes, self.seed, self.marks = corpus, sizes, seed, tuple(marks)
        self.base = base
        self.roles: Roles = roles(CORPORA[corpus](sizes.least), sizes, seed=seed)
        self.digest = digest(self.roles, sizes)
        texts = folder / f"{corpus}-{self.digest}-{base.hash[:8]}"
        self._texts = Texts(texts / f"states-{base.dtype}", sizes, base.bottom)
        self.folder = texts / self.key("everything")
        self._bases: dict[tuple[int, int, bool], CoreBasis] = {}

    def key(self, name: str) -> str:
        """Of something that is made here, and all that it is made of: 12 hex digits."""
        told: list[Any] = [name, self.digest, self.base.hash, self.seed, SETTINGS, self.marks]
        told += [self.base.dtype] if self.base.dtype != DTYPES[0] else []
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def everybody(self) -> tuple[Person, ...]:
        """Users of any part."""
        return (*self.roles.basis, *self.roles.tuned, *self.roles.reported)

    @cached_property
    def packages(self) -> list[str]:
        """What has to be installed for the text to be this one; nothing where it comes with Python."""
        found = PACKAGES.get(self.corpus)
        return found({person.id for person in self.everybody}) if found else []

    @cached_property
    def words(self) -> Words:
        """What training goes through of the head."""
        return Words.of(self.everybody, self.sizes, self.base.tokenizer, others=OTHERS)

    def training(self, person: Person) -> list[Any]:
        """What a user trains on."""
        return self.words.told(self.text(person).train)

    @cached_property
    def plain(self) -> Model:
        """The base model's own top."""
        return Model(self.base.model, self.base.plan, words=self.words, dtype=self.base.compute)

    @cached_property
    def beside(self) -> Model:
        """With the shared adapter in it: for what users have beside that."""
        return Model(
            self.base.model, self.base.plan, words=self.words, dtype=self.base.compute, beside=self.shared
        )

    def exact_beside(self) -> Model:
        """The same anew, in float32 alone, for somebody who changes it."""
        return Model(
            self.base.model, self.base.plan, words=self.words, dtype=torch.float32, beside=self.shared
        )

    def text(self, person: Person) -> Text:
        """Of one user."""
        return self._texts.of(person)

    def keep(self, key: str, user: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put aside what a user trained in an arm, for what is asked of it later."""
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        files.write_bytes(self._place(key, user), save(held))

    def keeps(self, key: str, user: str) -> bool:
        """Whether there is something put aside."""
        return self._place(key, user).exists()

    def tensors(self, key: str, user: str) -> dict[str, torch.Tensor]:
        """What was put aside."""
        return load_file(self._place(key, user))

    def adapter(self, tensors: Mapping[str, torch.Tensor]) -> LoraAdapter:
        """A LoRA's numbers as an adapter of this base."""
        return wire.loose_from_state(tensors, base_hash=self.base.hash)

    @cached_property
    def pooled(self) -> list[Any]:
        """What the cohort trains on, as one text."""
        return [block for person in self.roles.basis[:COHORT] for block in self.training(person)]

    def tuning_loss(self, way: Way, held: Sequence[Any]) -> float:
        """Mean loss of the users that step sizes are chosen on, with one thing for all or each their own."""
        own = list(held) if len(held) > 1 else [held[0]] * self.sizes.tuned
        unseen = self.unseen()
        return sum(way.loss(one, text) for one, text in zip(own, unseen, strict=True)) / len(unseen)

    def unseen(self) -> list[Blocks]:
        """Text that the users step sizes are chosen on were not trained on."""
        return [self.text(person).unseen for person in self.roles.tuned]

    @cached_property
    def shared(self) -> LoraAdapter:
        """Trained on the cohort's pooled text until the loss of users who are not in it stops falling."""
        path = self.folder / "shared.safetensors"
        if not path.exists():
            files.write_bytes(path, save(wire.to_state(self._trained_shared())))
        return self.adapter(load_file(path))

    @property
    def shared_id(self) -> str:
        """By which it is told apart: 12 hex digits."""
        return self.shared.content_hash()[:12]

    def _trained_shared(self) -> LoraAdapter:
        """With one step size after the other, each from the best so far and until it is no better."""
        shapes = emulator.target_shapes(self.base.model, self.base.plan)
        best = LoraAdapter(initial_pairs(shapes, rank=RANK, seed=self.seed), base_hash=self.base.hash)
        loss, marks = math.inf, range(_SHARED_EVERY, _SHARED_MOST + 1, _SHARED_EVERY)
        for rate in _SHARED_RATES:
            way = InLoop(self.plain, best, whole, batch=_SHARED_BATCH, seed=self.seed)
            for held in way.run([self.pooled], rate=rate, marks=marks):
                now = self.tuning_loss(way, held)
                click.echo(f"{self.corpus}: shared at {rate:g}: {now:.4f}")
                if not now < loss:
                    break
                best, loss = held[0], now
        return best

    def tuned(
        self,
        name: str,
        way: Way,
        *,
        on: Sequence[Blocks] | None = None,
        first: Sequence[float] = FIRST,
    ) -> Tuned:
        """The step size and number of steps that are best for a way; known ones are looked up.

        Args:
            on: texts to train on; those of the users it is chosen on if left out.
            first: step sizes that are tried whatever they come to.
        """
        path = self._tuned(self.key(name))
        if path.exists():
            told = json.loads(path.read_text())
            return Tuned(told["step_size"], told["steps"], told["tried"])
        own = [self.training(person) for person in self.roles.tuned]
        found = tune(self, way, on=on or own, first=first)
        files.write_text(path, json.dumps(found.to_dict()))
        return found

    def know(self, key: str, told: Mapping[str, Any]) -> None:
        """Take over what a row says of the step size that was best."""
        if not (path := self._tuned(key)).exists():
            files.write_text(path, json.dumps({name: told[name] for name in ("step_size", "steps", "tried")}))

    def _tuned(self, key: str) -> Path:
        return self.folder / f"tuned-{key}.json"

    def adapters(self, users: int) -> dict[str, LoraAdapter]:
        """Of the first users of the basis: full LoRAs from the shared one, at its tuned step size."""
        way, missing = self.full(), []
        paths = {one.id: self._place("cohort", one.id) for one in self.roles.basis[:users]}
        missing = [one for one in self.roles.basis[:users] if not paths[one.id].exists()]
        tuned = self.tuned("full LoRA", way)
        for first in range(0, len(missing), 8):
            some = missing[first : first + 8]
            texts = [self.training(one) for one in some]
            (held,) = way.run(texts, rate=tuned.rate, marks=[tuned.steps])
            for one, adapter in zip(some, held, strict=True):
                files.write_bytes(paths[one.id], save(wire.to_state(adapter)))
        return {name: self.adapter(load_file(path)) for name, path in paths.items()}

    def full(self) -> InLoop:
        """A full LoRA of a user's own, from the shared one."""
        return InLoop(self.plain, self.shared, whole, seed=self.seed)

    def basis(self, k: int, users: int, *, beside: bool = False) -> CoreBasis:
        """Of the users' adapters, by the joint method, as a bundle in floats has it.

        Args:
            beside: of what they have beside the shared adapter instead.
        """
        if (k, users, beside) not in self._bases:
            options = CompressOptions(method="joint", rank=k, basis_bits=32, core_bits=32, seed=self.seed)
            held = self.adapters(users)
            if beside:
                held = {user: difference(own, self.shared) for user, own in held.items()}
            self._bases[k, users, beside] = basis_of(compress(held, options))
        return self._bases[k, users, beside]

    def drawn(self, k: int, modules: Sequence[str]) -> CoreBasis:
        """Random orthonormal directions."""
        shapes = self.base.shapes(modules)
        return bases.drawn(shapes, k, seed=self.seed, base_hash=self.base.hash)

    def _place(self, key: str, user: str) -> Path:
        return self.folder / key / f"{user.replace('/', '+')}.safetensors"


def difference(own: LoraAdapter, other: LoraAdapter) -> LoraAdapter:
    """What an adapter changes beside another one, exact, of both ranks together."""
    pairs = {
        name: LoraPair(torch.cat([pair.A, other.pairs[name].A]), torch.cat([pair.B, -other.pairs[name].B], 1))
        for name, pair in own.pairs.items()
    }
    return replace(own, pairs=pairs)


class Base:
    """The base model, the plan that says which of its layers are trained, and those below.

    It is trained in its own dtype, as `compute_dtype = "auto"` of a configuration means it; what is trained
    is float32 all the same.
    """

    def __init__(self, model: Any, tokenizer: Any, *, hash: str, layers: int = LAYERS) -> None:
        self.model, self.tokenizer, self.hash, self.compute = model, tokenizer, hash, model.dtype
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.plan = emulator.make_plan(model, base_hash=hash, adapter_layers=layers, drop_ratio=0.0)
        self._bottom: Any = None

    @classmethod
    def smollm2(cls, dtype: str = DTYPES[0]) -> Base:
        """The demo's."""
        base = models.resolve("smollm2-135m", cache=ROOT / ".soppu" / "models")
        model = models.load_model(base, dtype=dtype)
        return cls(model, models.load_tokenizer(base), hash=base.hash)

    def bottom(self) -> tuple[Any, Any]:
        """The frozen layers and the tokenizer."""
        if self._bottom is None:
            self._bottom = emulator.with_layers(self.model, self.plan.bottom)
        return self._bottom, self.tokenizer

    def shapes(self, modules: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
        """Full-model name -> (o, i) of every module that is trained on, or of those of some projections."""
        found = emulator.target_shapes(self.model, self.plan)
        chosen = {name: shape for name, shape in found.items() if name.rpartition(".")[2] in modules}
        return chosen if modules else found

    def weights(self, modules: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Full-model name and weight (o, i) of these."""
        for name in self.shapes(modules):
            weight = self.model.get_submodule(name).weight.detach().float()
            yield name, weight.mT if self.plan.fan_in_fan_out else weight


def tune(ground: Ground, way: Way, *, on: Sequence[Blocks], first: Sequence[float] = FIRST) -> Tuned:
    """Try step sizes, more of them while the best is at an end, each after several numbers of steps."""
    losses: dict[tuple[float, int], float] = {}

    def attempt(rate: float) -> None:
        under_way = way.run(on, rate=rate, marks=ground.marks)
        for steps in ground.marks:
            loss = ground.tuning_loss(way, next(under_way))
            losses[rate, steps] = loss if math.isfinite(loss) else math.inf  # NaN is not the least
            own = [losses[rate, mark] for mark in ground.marks if (rate, mark) in losses]
            if losses[rate, steps] > min(min(losses.values()) + GIVEN_UP, min(own) + RISEN):
                return

    for rate in first:
        attempt(rate)
    while True:
        rate, steps = min(losses, key=losses.__getitem__)
        tried = sorted({rate for rate, _ in losses})
        place = LADDER.index(rate)
        beyond = place - 1 if rate == tried[0] else place + 1 if rate == tried[-1] else -1
        if not 0 <= beyond < len(LADDER):
            told = {f"{rate:g}, {steps}": loss for (rate, steps), loss in losses.items()}
            return Tuned(rate, steps, told)
        attempt(LADDER[beyond])
