"""A chat as the model reads it: the tokenizer's template, and which of its tokens the assistant wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from soppu.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_MARK = "generation %}", "generation -%}"
Turns = Sequence[tuple[str, str]]


def template_of(tokenizer: PreTrainedTokenizerBase, configured: str = "") -> str:
    """The Jinja template to render chats by: `data.chat_template`, or else the tokenizer's own.

    Raises:
        DataError: neither is there; the message names the key.
    """
    if configured:
        return PLAIN_TEMPLATE if configured == PLAIN else configured
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise DataError(
            "the text holds chats, and the base model's tokenizer has no chat template; set"
            f" data.chat_template to one (Jinja), or to {PLAIN!r}: lines of 'User: ...' and 'Assistant: ...'"
        )
    return str(own)


def tokens(turns: Turns, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and which of them are learned: the assistant's words with the end of the turn.

    By the template's own generation markers where it has them, else by what an answer adds to the rendering.

    Raises:
        DataError: the template refuses the chat, or its renderings do not tell where an answer begins.
    """
    try:
        if any(mark in template for mark in _MARK):
            return marked(turns, tokenizer, template)
        return by_difference(turns, tokenizer, template)
    except DataError:
        raise
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the chat template refuses a chat of {_roles(turns)}: {reason}") from None


def marked(turns: Turns, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[bool]]:
    """By generation markers, as transformers reads them."""
    told: Any = tokenizer.apply_chat_template(
        _messages(turns),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return _learning(list(told["input_ids"]), [bool(one) for one in told["assistant_masks"]], turns)


def by_difference(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[bool]]:
    """By renderings that grow: what comes after "now the assistant" in the next longer one is the answer.

    White space after an answer is the template's, not the assistant's. Every shorter rendering has to begin
    the whole one: a template that renders an earlier turn otherwise once others follow is refused.
    """
    whole = _render(turns, tokenizer, template)
    spans = list(_spans(turns, tokenizer, template, whole))
    told = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learned = [
        any(start < end_of and begin < end for begin, end_of in spans)
        for start, end in told["offset_mapping"]
    ]
    return _learning(list(told["input_ids"]), learned, turns)


def _spans(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, template: str, whole: str
) -> Iterator[tuple[int, int]]:
    """(begin, end) of every answer in the whole rendering, in characters."""
    for number, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        before = _render(turns[:number], tokenizer, template, answer=True)
        after = _render(turns[: number + 1], tokenizer, template)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"the chat template renders turn {number + 1} of {_roles(turns)} otherwise when others"
                " follow, so what the assistant wrote cannot be told; set data.chat_template to one with"
                " {% generation %} markers"
            )
        end = len(after.rstrip()) if content.strip() else len(after)
        yield len(before), max(end, len(before) + 1)


def _render(turns: Turns, tokenizer: PreTrainedTokenizerBase, template: str, *, answer: bool = False) -> str:
    said: Any = tokenizer.apply_chat_template(
        _messages(turns), chat_template=template, tokenize=False, add_generation_prompt=answer
    )
    return str(said)


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _learning(ids: list[int], learned: list[bool], turns: Turns) -> tuple[list[int], list[bool]]:
    if not any(learned):
        raise DataError(f"the chat template marks nothing as the assistant's in a chat of {_roles(turns)}")
    return ids, learned


def _roles(turns: Turns) -> str:
    return ", ".join(role for role, _ in turns[:6]) + (", ..." if len(turns) > 6 else "")
