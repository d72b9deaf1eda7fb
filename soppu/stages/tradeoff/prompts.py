"""What is asked of every arm: the beginnings of users' held-out examples, as training would read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from soppu.data import Example, UserData, tokenize
from soppu.data.tokens import IGNORE, Block
from soppu.data_settings import DataConfig
from soppu.evaluate.tradeoff.texts import is_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of text that is Python functions, where one ends and the model goes on with the next
STOP = ("\ndef ", "\nclass ", "\n@", "\nif ")


@dataclass(frozen=True)
class Ask:
    """One prompt of one user, as JSON values.

    Attributes:
        inputs: what the model reads: special tokens spelled out, a long prompt without its beginning.
        prompt: the whole of it, for people and parsers.
        reference: what the user wrote next, as many tokens of it as may be generated.
        example: place in the user's held-out text.
    """

    user: str
    inputs: str
    prompt: str
    reference: str
    example: int


def choose(
    text: UserData, tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, prompts: int, new_tokens: int
) -> list[Ask]:
    """The first prompts of a user's held-out text, which is in the order of content hashes."""
    asks = []
    for place, item in enumerate(text.heldout[:prompts]):
        blocks = tokenize([item], tokenizer, max_tokens=data.max_tokens, chat_template=data.chat_template)
        asks.append(_ask(text.user_id, place, (item, blocks[0]), tokenizer, new_tokens))
    return asks


def of_functions(texts: Sequence[UserData], *, prompts: int) -> bool:
    """Whether all that is asked are heads of Python functions, so that syntax can be told."""
    asked = [item for text in texts for item in text.heldout[:prompts]]
    return bool(asked) and all(is_function(item.prompt, item.completion) for item in asked)


def _ask(
    user: str, place: int, what: tuple[Example, Block], tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> Ask:
    item, block = what
    ids, learned = block.ids.tolist(), [label != IGNORE for label in block.labels.tolist()]
    start = learned.index(True)
    if not any(token not in tokenizer.all_special_ids for token in ids[:start]):
        start = max(1, len(ids) // 2)  # plain text has no prompt: its first half is one
    end = next((n for n in range(start, len(ids)) if not learned[n]), len(ids))
    inputs = str(tokenizer.decode(ids[:start]))
    reference = str(tokenizer.decode(ids[start : min(end, start + new_tokens)], skip_special_tokens=True))
    return Ask(user, inputs, item.prompt or inputs, reference, place)
