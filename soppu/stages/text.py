"""The text a run is prepared for: read once for all users, tried on the base model, known again later."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from soppu.config import Config
from soppu.data import Example, UserData, list_users, load_public, load_user, source_digest, tokenize
from soppu.data_settings import DataConfig
from soppu.errors import ConfigError, DataError
from soppu.federation import members
from soppu.registry import check_user_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "text.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """What a run was prepared for: user -> hash of the text that is used, and who was left out, and why."""

    users: dict[str, str]
    public: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self, source: str) -> dict[str, Any]:
        """As JSON: with the hash of the whole source, by which a change is noticed without reading it all; ""
        is no source here.
        """
        return {
            "source": source_digest(source) if source else "",
            "users": self.users,
            "left_out": self.left_out,
        }


def read(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read everybody's text, and the public one, and try what the tokenizer makes of it. O(bytes).

    Raises:
        DataError: a user has too little text, or text that cannot be read, and `data.on_small_user` is
            "error"; or nobody is left.
        RegistryError: a user's id cannot be stored.
        ConfigError: a limit of tokens is more than the model takes.
    """
    trial = _Trial(config, model, tokenizer)
    public = load_public(config.align.source, limit=config.align.examples, config=config.data)
    trial.check(public, who="align.source")
    if config.federation.connection:  # users' text is on nodes of its own, and none is read here
        return Text(dict.fromkeys(_members(config), ""), tuple(item.digest() for item in public))
    users, left_out = {}, {}
    for name, found in everybody(config.data):
        try:
            if isinstance(found, DataError):
                raise found
            trial.check(found.examples, who=f"user {found.user_id!r}")
            users[check_user_id(found.user_id)] = found.digest()
        except DataError as error:
            if config.data.on_small_user == "error":
                raise
            left_out[name] = str(error)
            _log.warning("left out: user %r: %s", name, error)
    if not users:
        why = next(iter(left_out.values()), "it holds no text")
        raise DataError(f"data.source: {config.data.source} has nobody to train on: {why}")
    return Text(users, tuple(item.digest() for item in public), left_out)


def _members(config: Config) -> list[str]:
    """Who is to take part where text is on nodes: whom their table names, or `data.users` of it."""
    if not config.federation.members:
        raise ConfigError(
            f"federation.connection = {config.federation.connection!r}: federation.members has to name the"
            " table of nodes and their users; `soppu federation register` makes it"
        )
    known = sorted(members.read(config.federation.members).values())
    if strangers := sorted(set(config.data.users).difference(known)):
        raise ConfigError(
            f"data.users: {', '.join(strangers)} not in {config.federation.members}; it has"
            f" {', '.join(known)}"
        )
    if not known:
        raise ConfigError(f"{config.federation.members}: no node is registered yet")
    return list(config.data.users) or known


def everybody(config: DataConfig) -> Iterator[tuple[str, UserData | DataError]]:
    """Every user of a source, with their text or with what is wrong with it."""
    for user in list_users(config):
        try:
            yield user, load_user(config, user)
        except DataError as error:
            yield user, error


def check_here(config: Config) -> None:
    """Refuse a run whose users' text is on nodes of its own: ConfigError."""
    if config.federation.connection:
        raise ConfigError(
            f"federation.connection = {config.federation.connection!r}: users' text is on nodes of its own;"
            " this needs a run that reads it here"
        )


def check_unchanged(config: DataConfig, known: Mapping[str, Any]) -> None:
    """Refuse text that is not what the run was prepared for. O(files) where nothing has changed.

    Raises:
        DataError: names the first user whose text is another.
    """
    if not known or not known["source"] or source_digest(config.source) == known["source"]:
        return
    for user, digest in known["users"].items():
        try:
            found = load_user(config, user).digest()
        except DataError as error:
            raise _changed(user, config.source, f" ({error})") from None
        if found != digest:
            raise _changed(user, config.source, "")


def _changed(user: str, source: str, why: str) -> DataError:
    return DataError(
        f"the text of user {user!r} in {source} has changed since this run was prepared{why}; prepare again:"
        " the same configuration on the new text is a run of its own"
    )


class _Trial:
    """What a model and its tokenizer can read, tried before anything is started for it."""

    def __init__(self, config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._rendered: set[tuple[str, ...]] = set()
        _check_positions(config, model)
        rows = len(cast(torch.Tensor, model.get_input_embeddings().weight))
        self._strange = _beyond(config, tokenizer, rows)

    def check(self, examples: Iterable[Example], *, who: str) -> None:
        """Every kind of chat rendered once, no text with a token the model has not. DataError says whose."""
        for item in examples:
            text = f"{item.prompt}{item.completion}{''.join(content for _, content in item.turns)}"
            if strange := next((token for token in self._strange if token in text), None):
                raise DataError(
                    f"{who}: the text holds {strange!r}, token {self._strange[strange]} of the tokenizer, "
                    f" which base model {self._config.base.model!r} does not have; take it out of the text"
                )
            roles = tuple(role for role, _ in item.turns)
            if roles and roles not in self._rendered:
                self._render(item, who)
                self._rendered.add(roles)

    def _render(self, item: Example, who: str) -> None:
        data = self._config.data
        try:
            tokenize([item], self._tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template)
        except DataError as error:
            raise DataError(f"{who}: {error}") from None


def _check_positions(config: Config, model: PreTrainedModel) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = {"data.max_tokens": config.data.max_tokens, "align.max_tokens": config.align.max_tokens}
    wrong = [f"{key} = {value}" for key, value in limits.items() if most is not None and value > most]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: allowed: at most {most}, the positions of {config.base.model!r}"
        )


def _beyond(config: Config, tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """Tokens added to a tokenizer that the model has no row for. ConfigError if it cannot do without.

    Some models come with such, for images for one; what is in no text does no harm.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    added = set(tokenizer.get_added_vocab())
    special = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token}
    if needed := [token for token in beyond if token not in added or token in special]:
        raise ConfigError(
            f"base.model = {config.base.model!r}: its tokenizer has token {beyond[needed[0]]}"
            f" ({needed[0]!r}), the model has {rows}, numbered from 0; give a folder whose"
            " tokenizer and model belong together"
        )
    return beyond
