"""From a user's text to token blocks: reading, splitting, tokenising. It never leaves this process.

Sources: `stdlib` (the built-in corpus), a JSONL file for all users, or a folder with one JSONL file a user.
Every line is an object with the keys `user_id`, `prompt` and `completion`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soppu import corpus, files
from soppu.config import DataConfig
from soppu.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STDLIB = "stdlib"
STDLIB_PUBLIC = "stdlib-public"
IGNORE = -100
HELD_OUT_ONE_IN = 4
VALIDATION_ONE_IN = 5  # of what is not held out
_KEYS = ("user_id", "prompt", "completion")


@dataclass(frozen=True)
class Example:
    """One thing a user asked for and what they wrote."""

    prompt: str
    completion: str

    def digest(self) -> str:
        """Content hash: the order of a split does not depend on the order of a file."""
        return hashlib.sha256(f"{self.prompt}\0{self.completion}".encode()).hexdigest()

    def is_held_out(self) -> bool:
        """Whether this is one of the quarter that is never trained on, whatever any configuration says."""
        return int(self.digest()[:8], 16) % HELD_OUT_ONE_IN == 0

    def is_for_validation(self) -> bool:
        """Whether, if not held out, this is one to choose with: steps, step size, what the user is served."""
        return int(self.digest()[8:16], 16) % VALIDATION_ONE_IN == 0


@dataclass(frozen=True)
class UserData:
    """One user's examples, already split: to train on, to choose with, to be judged by."""

    user_id: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    heldout: tuple[Example, ...]

    def digest(self) -> str:
        """Content hash over all parts."""
        groups = (self.train, self.validation, self.heldout)
        parts = [[item.digest() for item in group] for group in groups]
        return hashlib.sha256(json.dumps([self.user_id, *parts]).encode()).hexdigest()


@dataclass(frozen=True)
class Block:
    """One tokenised example: ids (t,), labels (t,) with IGNORE on the prompt."""

    ids: Tensor
    labels: Tensor


def list_users(config: DataConfig) -> list[str]:
    """The users of a source: those named in `data.users`, else everybody in it.

    Raises:
        DataError: the source cannot be read, or a named user is not in it.
    """
    if config.source == STDLIB:
        unknown = [user for user in config.users if not corpus.is_package(user)]
        known = corpus.packages(least=config.min_examples + 1) if unknown or not config.users else []
    else:
        known = sorted(_read_source(config.source))
        unknown = [user for user in config.users if user not in known]
    if unknown:
        raise DataError(f"data.users: {', '.join(unknown)} not in {config.source}; it has {', '.join(known)}")
    return list(config.users) or known


def load_user(config: DataConfig, user_id: str) -> UserData:
    """Read and split one user's examples.

    The split is by content hash alone: the same on every machine and under every configuration, so that
    nothing is ever measured on text that was trained on. The configured numbers only shorten each part.

    Raises:
        DataError: fewer than `data.min_examples` are left to train on.
    """
    examples = sorted(set(_examples(config.source, user_id)), key=Example.digest)
    held, rest = _apart(examples, Example.is_held_out)
    if len(rest) < config.min_examples:
        raise DataError(
            f"user {user_id!r} has {len(rest)} examples to train on in {config.source} ({len(held)} are held"
            f" out), data.min_examples is {config.min_examples}"
        )
    validation, train = _apart(rest, Example.is_for_validation)
    if not train:
        train = validation  # one example, or all of them drawn
    return UserData(
        user_id,
        tuple(train[: config.train_examples]),
        tuple(validation[: config.validation_examples]),
        tuple(held[: config.heldout_examples]),
    )


def _apart(examples: list[Example], chosen: Callable[[Example], bool]) -> tuple[list[Example], list[Example]]:
    """Those chosen, or the first where there is none, and the others."""
    apart = [item for item in examples if chosen(item)] or examples[:1]
    taken = set(apart)
    return apart, [item for item in examples if item not in taken]


def load_public(source: str, *, limit: int) -> list[Example]:
    """Text the server may see, for aligning the emulator: `stdlib-public` or a JSONL file."""
    if source == STDLIB_PUBLIC:
        examples = [Example(*pair) for pair in corpus.public_functions()]
    else:
        examples = [item for items in _read_source(source).values() for item in items]
    if not examples:
        raise DataError(f"align.source: {source} holds no examples")
    return sorted(set(examples), key=Example.digest)[:limit]


def split_public(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Public text to train the emulator on, and some that it never is; a single text has to be both."""
    unseen, rest = _apart(examples, Example.is_held_out)
    return rest or unseen, unseen


def source_digest(source: str) -> str:
    """Content hash of all text of a source, users' or public; DataError if it cannot be read. O(bytes)."""
    if source in (STDLIB, STDLIB_PUBLIC):
        return f"{source} {platform.python_version()}"
    parts = [f"{item.name} {files.sha256_file(item)}" for item in _source_files(source)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tokenize(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[Block]:
    """Token blocks of at most `max_tokens`; the prompt is masked from the loss.

    A prompt longer than half a block loses its beginning (but not a token that the tokenizer begins every
    text with), a completion that does not fit loses its end.
    """
    blocks = []
    for item in examples:
        prompt = tokenizer.encode(item.prompt)
        special = prompt[: len(prompt) - len(tokenizer.encode(item.prompt, add_special_tokens=False))]
        prompt = special + prompt[len(special) :][-(max_tokens // 2 - len(special)) :]
        completion = tokenizer.encode(item.completion, add_special_tokens=False)
        completion = [*completion, tokenizer.eos_token_id][: max_tokens - len(prompt)]
        ids = torch.tensor(prompt + completion)
        labels = torch.tensor([IGNORE] * len(prompt) + completion)
        blocks.append(Block(ids, labels))
    return blocks


def collate(blocks: Sequence[Block], *, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad to one length: ids (b, t), attention mask (b, t), labels (b, t) with IGNORE on padding."""
    ids = torch.nn.utils.rnn.pad_sequence([b.ids for b in blocks], batch_first=True, padding_value=pad_id)
    labels = torch.nn.utils.rnn.pad_sequence(
        [b.labels for b in blocks], batch_first=True, padding_value=IGNORE
    )
    lengths = torch.tensor([len(b.ids) for b in blocks])
    mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
    return ids, mask, labels


def _examples(source: str, user_id: str) -> list[Example]:
    if source == STDLIB:
        return [Example(*pair) for pair in corpus.functions(user_id)]
    users = _read_source(source)
    if user_id not in users:
        raise DataError(f"user {user_id!r} is not in {source}; it has {', '.join(sorted(users))}")
    return users[user_id]


def _source_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        if paths := sorted(path.glob("*.jsonl")):
            return paths
        raise DataError(f"{path}: no *.jsonl files; give a JSONL file, a folder of them, or {STDLIB!r}")
    if path.is_file():
        return [path]
    raise DataError(f"{path}: no such file or folder, and not {STDLIB!r}")


def _read_source(source: str) -> dict[str, list[Example]]:
    users: dict[str, list[Example]] = {}
    for item in _source_files(source):
        state = item.stat()
        examples = _read_jsonl(item, state.st_mtime_ns, state.st_size)
        if not examples:
            raise DataError(f"{item}: user without examples: the file holds no line")
        for user_id, example in examples:
            users.setdefault(user_id, []).append(example)
    return users


@lru_cache(maxsize=64)
def _read_jsonl(path: Path, changed: int, size: int) -> tuple[tuple[str, Example], ...]:
    """A file's lines; `changed` and `size` are there for the cache, since every user asks for the file."""
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return tuple(_parse(line, f"{path}:{number}") for number, line in lines if line.strip())


def _parse(line: bytes, where: str) -> tuple[str, Example]:
    try:
        value = json.loads(line.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON in UTF-8: {error}") from None
    missing = [key for key in _KEYS if not isinstance(value, dict) or not isinstance(value.get(key), str)]
    if missing:
        raise DataError(f"{where}: lacks the text key {', '.join(missing)}; needed: {', '.join(_KEYS)}")
    if not value["completion"]:
        raise DataError(f"{where}: user {value['user_id']!r}: completion is empty")
    return value["user_id"], Example(value["prompt"], value["completion"])
