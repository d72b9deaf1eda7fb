"""Who is in the study of personal forms, in which part, and their text behind the frozen layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks import changelogs
from soppu import corpus, files
from soppu.data import IGNORE, UserData, tokenize
from soppu.data.examples import Example, Record
from soppu.data.split import split
from soppu.federation import emulator
from soppu.federation.train import CachedBlock, cache_states


@dataclass(frozen=True)
class Sizes:
    """How many users have which part, and how much of their text counts."""

    basis: int = 48
    tuned: int = 4  # on whom every arm's step size is chosen; never reported
    reported: int = 16
    train: int = 32
    validation: int = 8
    heldout: int = 20
    max_tokens: int = 64
    least: int = 40  # examples of a user


@dataclass(frozen=True)
class Person:
    """Somebody with text of their own. `group`: whose is of the same kind, as one package's files are."""

    id: str
    group: str
    records: tuple[Record, ...]

    def text(self, sizes: Sizes) -> UserData:
        """Split as everybody's is: the newest quarter held out where there are dates, else one by hash."""
        rest, held = split(self.records, who=self.id)
        chosen = [item for item in rest if item.is_for_validation()] or rest[:1]
        train = [item for item in rest if item not in set(chosen)]
        parts = train[: sizes.train], chosen[: sizes.validation], held[: sizes.heldout]
        return UserData(self.id, *map(tuple, parts))


@dataclass(frozen=True)
class Roles:
    """Users by part; nobody is in two, and no group of a reported or tuned user is in another part."""

    basis: tuple[Person, ...]  # of which the first ones make a smaller basis
    tuned: tuple[Person, ...]
    reported: tuple[Person, ...]


def stdlib(least: int) -> list[Person]:
    """A user a file of Python's own library; a group a package."""
    found = corpus.by_file(least=least)
    return [
        Person(name, name.split("/")[0], tuple(Record(Example(*pair)) for pair in pairs))
        for name, pairs in found.items()
    ]


def authors(least: int) -> list[Person]:
    """A user an author of Debian changelogs, each a group of their own."""
    return [Person(name, name, tuple(own)) for name, own in changelogs.authors(least=least).items()]


CORPORA: Mapping[str, Callable[[int], list[Person]]] = {"stdlib": stdlib, "changelogs": authors}
# what a machine has to have installed for the text of some users to be the same
PACKAGES: Mapping[str, Callable[[Collection[str]], list[str]]] = {"changelogs": changelogs.packages}
UNSEEN = 16  # examples a user that step sizes are chosen by
_MOST_OF_A_GROUP = {"reported": 3, "tuned": 1}  # of a part


def roles(people: Iterable[Person], sizes: Sizes, *, seed: int) -> Roles:
    """Deal people out, by hash. ClickException where they are too few."""
    groups: dict[str, list[Person]] = {}
    for person in sorted(people, key=lambda person: _rank(person.id, seed)):
        groups.setdefault(person.group, []).append(person)
    order = sorted(groups, key=lambda name: _rank(name, seed))
    reported = _taken(groups, order, sizes.reported, most=_MOST_OF_A_GROUP["reported"])
    tuned = _taken(groups, order, sizes.tuned, most=_MOST_OF_A_GROUP["tuned"])
    rest = sorted((one for name in order for one in groups[name]), key=lambda one: _rank(one.id, seed))
    found = Roles(tuple(rest[: sizes.basis]), tuple(tuned), tuple(reported))
    for part, wanted in (("reported", sizes.reported), ("tuned", sizes.tuned), ("basis", sizes.basis)):
        if (there := len(getattr(found, part))) < wanted:
            raise click.ClickException(f"{part}: {wanted} users are needed, this machine's text has {there}")
    return found


def _taken(groups: Mapping[str, list[Person]], order: list[str], wanted: int, *, most: int) -> list[Person]:
    """The first users of the first groups in `order`, which leave it."""
    taken: list[Person] = []
    while order and len(taken) < wanted:
        taken += groups[order.pop(0)][: min(most, wanted - len(taken))]
    return taken


def _rank(name: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def digest(found: Roles, sizes: Sizes) -> str:
    """Of everybody's part and text: 12 hex digits."""
    told = {
        part: [one.text(sizes).digest() for one in getattr(found, part)]
        for part in ("basis", "tuned", "reported")
    }
    return hashlib.sha256(json.dumps([told, sizes.max_tokens]).encode()).hexdigest()[:12]


class Text:
    """One user's text behind the frozen layers; a part is put through them when it is first asked for."""

    def __init__(self, of: Callable[[str], list[CachedBlock]]) -> None:
        self._of = of

    @cached_property
    def train(self) -> list[CachedBlock]:
        """What the user is trained on."""
        return self._of("train")

    @cached_property
    def validation(self) -> list[CachedBlock]:
        """What a user chooses by."""
        return self._of("validation")

    @cached_property
    def heldout(self) -> list[CachedBlock]:
        """What a reported user is judged by."""
        return self._of("heldout")

    @cached_property
    def unseen(self) -> list[CachedBlock]:
        """Text that is not trained on: what a step size is chosen by, of users who are not reported."""
        return [*self.validation, *self.heldout][:UNSEEN]


class Words:
    """The tokens that training texts have, numbered anew: what a head that is trained through has to know.

    A softmax over all tokens is more than half of a step, and nearly all of them are in nobody's text. Of
    these some, `others`, are drawn and stand for all: without any, nothing keeps unlikely what nobody says.
    Losses that are chosen or reported by are over all tokens.
    """

    def __init__(self, ids: Tensor, *, others: int = 0) -> None:
        self.ids = ids.unique()  # sorted, (n,)
        self.ids = self.ids[self.ids != IGNORE]
        self._others = others

    @classmethod
    def of(cls, people: Iterable[Person], sizes: Sizes, tokenizer: Any, *, others: int) -> Words:
        """What everybody is trained on."""
        examples = [item for person in people for item in person.text(sizes).train]
        blocks = tokenize(examples, tokenizer, max_tokens=sizes.max_tokens)
        return cls(torch.cat([one.labels for one in blocks]), others=others)

    def told(self, blocks: Iterable[CachedBlock]) -> list[CachedBlock]:
        """Blocks with their labels in the new numbers."""
        return [
            CachedBlock(
                one.states,
                torch.where(one.labels == IGNORE, IGNORE, torch.searchsorted(self.ids, one.labels)),
            )
            for one in blocks
        ]

    def cut(self, top: emulator.TopModel) -> emulator.TopModel:
        """The same layers, under a head of these tokens and those drawn."""
        return _Cut(top, self.ids, self._others)


class _Cut(emulator.TopModel):
    def __init__(self, top: emulator.TopModel, ids: Tensor, others: int) -> None:
        self.model = top.model
        head: Any = self.model.get_output_embeddings()
        weight = head.weight.detach()
        rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, ids, False).nonzero()[:, 0]
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:others]]
        self._head = weight[torch.cat([ids, drawn])]
        self._bias = torch.zeros(len(self._head), dtype=weight.dtype)
        # each stands for as many: the sum of exponentials is that of all tokens in the mean of draws
        self._bias[len(ids) :] = math.log(len(rest) / max(1, len(drawn))) if len(rest) else 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., n + others) of these tokens."""
        return torch.nn.functional.linear(hidden, self._head, self._bias)


class Texts:
    """Users' texts; each part is put through the frozen layers once, and then lies in `folder`.

    Args:
        bottom: gives the frozen layers and the tokenizer when they are needed first.
    """

    def __init__(self, folder: Path, sizes: Sizes, bottom: Callable[[], tuple[Any, Any]]) -> None:
        self._folder, self._sizes, self._bottom = folder, sizes, bottom
        self._held: dict[str, Text] = {}

    def of(self, person: Person) -> Text:
        """What the layers make of a person's text."""
        return self._held.setdefault(person.id, Text(lambda part: self._part(person, part)))

    def _part(self, person: Person, part: str) -> list[CachedBlock]:
        path = self._folder / f"{person.id.replace('/', '+')}.{part}.safetensors"
        if not path.exists():
            files.write_bytes(path, save(self._computed(person, part)))
        held = load_file(path)
        keys = sorted({key.split("/")[0] for key in held})
        return [CachedBlock(held[f"{key}/states"], held[f"{key}/labels"]) for key in keys]

    def _computed(self, person: Person, part: str) -> dict[str, Tensor]:
        bottom, tokenizer = self._bottom()
        examples, made = getattr(person.text(self._sizes), part), {}
        blocks = tokenize(examples, tokenizer, max_tokens=self._sizes.max_tokens)
        for number, block in enumerate(cache_states(bottom, blocks, pad_id=tokenizer.pad_token_id)):
            made |= {f"{number:04}/states": block.states, f"{number:04}/labels": block.labels}
        return made
