"""From examples to token blocks: what is read, and what of it is learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soppu.data import chat
from soppu.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


@dataclass(frozen=True)
class Block:
    """One tokenised example, or a part of a long one: ids (t,), labels (t,) with IGNORE where only read."""

    ids: Tensor
    labels: Tensor


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    chat_template: str = "",
) -> list[Block]:
    """Token blocks of at most `max_tokens`, one or more an example; what is not to be learned is masked.

    Of prompt and completion, a prompt longer than half a block loses its beginning (but not a token that the
    tokenizer begins every text with), a completion that does not fit loses its end. A chat that does not fit
    is read in several blocks: each turn of the assistant is learned once, with up to half a block of what
    came before it. Plain text is learned whole, block by block.

    Args:
        examples: what to tokenise, in order.
        tokenizer: of the base model.
        max_tokens: of a block.
        chat_template: `data.chat_template`; only chats ask for it.

    Raises:
        DataError: a chat cannot be rendered.
    """
    blocks = []
    for item in examples:
        if item.turns:
            ids, learned = chat.tokens(item.turns, tokenizer, chat.template_of(tokenizer, chat_template))
            blocks += list(_windows(ids, learned, max_tokens=max_tokens, before=max_tokens // 2))
        elif item.plain:
            blocks += _plain(item.completion, tokenizer, max_tokens=max_tokens)
        else:
            blocks.append(_pair(item, tokenizer, max_tokens=max_tokens))
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


def _pair(item: Example, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Block:
    prompt = tokenizer.encode(item.prompt)
    special = prompt[: len(prompt) - len(tokenizer.encode(item.prompt, add_special_tokens=False))]
    prompt = special + prompt[len(special) :][-(max_tokens // 2 - len(special)) :]
    completion = tokenizer.encode(item.completion, add_special_tokens=False)
    completion = [*completion, tokenizer.eos_token_id][: max_tokens - len(prompt)]
    return Block(torch.tensor(prompt + completion), torch.tensor([IGNORE] * len(prompt) + completion))


def _plain(text: str, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Iterator[Block]:
    """A piece of a longer text: no end is learned, since it need not be the end of anything."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.encode(text)
    special = whole[: len(whole) - len(ids)]
    step = max_tokens - len(special)
    if len(special) + len(ids) < 2:
        ids = [*ids, tokenizer.eos_token_id]
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        if special or len(part) > 1:  # one token alone follows from nothing
            yield Block(torch.tensor(special + part), torch.tensor([IGNORE] * len(special) + part))


def _windows(ids: list[int], learned: list[bool], *, max_tokens: int, before: int) -> Iterator[Block]:
    """Parts of at most `max_tokens` that learn every learned token once; one that fits is one part."""
    place = 0
    while True:
        first = next((n for n in range(place, len(ids)) if learned[n]), None)
        if first is None:
            return
        start = 0 if len(ids) <= max_tokens else max(0, first - before)
        end = min(len(ids), start + max_tokens)
        labels = [ids[n] if learned[n] and n >= place else IGNORE for n in range(start, end)]
        yield Block(torch.tensor(ids[start:end]), torch.tensor(labels))
        place = end
