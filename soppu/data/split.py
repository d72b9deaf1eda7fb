"""One user's examples, and which of them are held out: by time where there are dates, else by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from soppu import corpus, user_ids
from soppu.data import rows
from soppu.data.arrow import Selection
from soppu.data.examples import HELD_OUT_ONE_IN, Example, Record, passages
from soppu.data.listing import STDLIB, STDLIB_PUBLIC, look
from soppu.data.records import Layout, record
from soppu.data.sources import of_split, open_source
from soppu.data_settings import DataConfig
from soppu.errors import DataError


@dataclass(frozen=True)
class UserData:
    """One user's examples, already split: to train on, to choose with, to be judged by."""

    user_id: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    heldout: tuple[Example, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.train, *self.validation, *self.heldout)))

    def digest(self) -> str:
        """Content hash over all parts."""
        groups = (self.train, self.validation, self.heldout)
        parts = [[item.digest() for item in group] for group in groups]
        return hashlib.sha256(json.dumps([self.user_id, *parts]).encode()).hexdigest()


def list_users(config: DataConfig) -> list[str]:
    """The users of a source, by id: those named in `data.users`, else everybody in it.

    With `data.on_small_user = "leave-out"` those are listed too who cannot be read: `load_user` says why.

    Raises:
        DataError: the source cannot be read, or a named user is not in it, or one of them cannot be read.
    """
    wanted = [_as_id(user) for user in config.users]
    if config.source == STDLIB:
        unknown = [user for user in wanted if not corpus.is_package(user)]
        known = corpus.packages(least=config.min_examples + 1) if unknown or not wanted else []
    else:
        source = open_source(config)
        if source.whole and len(wanted) == 1:
            return wanted
        if source.unnamed:
            raise source.unnamed
        known = source.users()
        there = set(known)
        unknown = [user for user in wanted if user not in there]
        if config.on_small_user == "error":
            faults = [source.faults[user] for user in wanted or list(source.faults) if user in source.faults]
            if faults:
                raise faults[0]
    if unknown:
        have = user_ids.some(known)
        raise DataError(f"data.users: {', '.join(unknown)} not in {config.source}; it has {have}")
    return wanted or known


def load_user(config: DataConfig, user_id: str) -> UserData:
    """Read and split one user's examples.

    The split is the same on every machine and under every configuration, so that nothing is ever measured on
    text that was trained on: the newest quarter where the examples have dates, else a quarter by hash.
    The configured numbers only shorten each part.

    Raises:
        DataError: fewer than `data.min_examples` are left to train on, or the text cannot be read.
    """
    rest, held = split(_records(config, _as_id(user_id)), who=f"user {user_id!r} in {config.source}")
    if len(rest) < config.min_examples:
        raise DataError(
            f"user {user_id!r} has {len(rest)} examples to train on in {config.source} ({len(held)} are held"
            f" out), data.min_examples is {config.min_examples}"
        )
    validation, train = _apart(rest, Example.is_for_validation)
    return UserData(
        _as_id(user_id),
        tuple((train or validation)[: config.train_examples]),  # one example, or all of them drawn
        tuple(validation[: config.validation_examples]),
        tuple(held[: config.heldout_examples]),
    )


def split(records: Iterable[Record], *, who: str) -> tuple[list[Example], list[Example]]:
    """(the rest, held out), each in the order of content hashes; a repeat counts once, with its first date.

    Raises:
        DataError: some examples have a date and others have none.
    """
    dates: dict[Example, float | None] = {}
    for item in records:
        known = dates.setdefault(item.example, item.date)
        if known is not None and item.date is not None:
            dates[item.example] = min(known, item.date)
    examples = sorted(dates, key=Example.digest)
    dated = [item for item in examples if dates[item] is not None]
    if dated and len(dated) < len(examples):
        raise DataError(
            f"{who}: {len(dated)} of {len(examples)} examples have a date, needed: all or none, since the"
            ' newest quarter is held out; data.date_column = "" leaves dates out of account'
        )
    if dated:
        newest = sorted(examples, key=lambda item: (dates[item] or 0.0, item.digest()))
        held = set(newest[-max(1, len(newest) // HELD_OUT_ONE_IN) :])
        return [item for item in examples if item not in held], [item for item in examples if item in held]
    held_out, rest = _apart(examples, Example.is_held_out)
    return rest, held_out


def _apart(examples: list[Example], chosen: Callable[[Example], bool]) -> tuple[list[Example], list[Example]]:
    """Those chosen, or the first where there is none, and the others."""
    apart = [item for item in examples if chosen(item)] or examples[:1]
    taken = set(apart)
    return apart, [item for item in examples if item not in taken]


def load_public(source: str, *, limit: int, config: DataConfig | None = None) -> list[Example]:
    """Text the server may see, for aligning the emulator: `stdlib-public`, or any layout, whoever's it is.

    `config` says what columns are called, and which split is meant.
    """
    if source == STDLIB_PUBLIC:
        examples = [Example(*pair) for pair in corpus.public_functions()]
    else:
        examples = list(_public(source, config or DataConfig()))
    if not examples:
        raise DataError(f"align.source: {source} holds no examples")
    return sorted(set(examples), key=Example.digest)[:limit]


def split_public(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Public text to train the emulator on, and some that it never is; a single text has to be both."""
    unseen, rest = _apart(examples, Example.is_held_out)
    return rest or unseen, unseen


def _public(source: str, config: DataConfig) -> Iterable[Example]:
    layout = Layout.of(config)
    selection = Selection(config.split, layout.wanted())
    for path in of_split(look(Path(source)), config.split).everything():
        if rows.ending(path) == rows.TEXT:
            yield from passages(rows.read_text(path))
        else:
            for number, row in rows.read_rows(path, selection):
                yield record(row, f"{path}:{number}", layout, user=False).example


def _records(config: DataConfig, user_id: str) -> list[Record]:
    if config.source == STDLIB:
        return [Record(Example(*pair)) for pair in corpus.functions(user_id)]
    source = open_source(config, user_id)
    found = source.records(user_id)
    if not found:
        have = user_ids.some(source.users())
        raise DataError(f"user {user_id!r} is not in {config.source}; it has {have}")
    return found


def _as_id(user: str) -> str:
    """A name that can be no id is its own: the source has its fault under it."""
    try:
        return user_ids.to_id(user)
    except DataError:
        return user
