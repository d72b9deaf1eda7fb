"""A conversation as the text that the model was trained to go on with."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from soppu.errors import RequestError

_GUIDELINE = re.compile(r"\{[{%][^}]*\bguideline\b")  # an expression or a statement that reads it


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, guideline: str = "") -> str:
    """The messages, and the beginning of the assistant's answer, by the tokenizer's chat template.

    Raises:
        RequestError: 422 `template_error` where there is no template or it refuses the messages, 422
            `missing_template_variable` where it reads `guideline` and none was given.
    """
    variables: dict[str, Any] = {"guideline": guideline} if guideline else {}
    try:
        if not guideline and _GUIDELINE.search(tokenizer.get_chat_template()):
            # LoRAX's words, misspelt as there
            raise _refused("Missing template vatiable: guideline", "missing_template_variable")
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
    except RequestError:
        raise
    except Exception as error:  # a template is a program of somebody else's, and may raise anything
        why = "the tokenizer has no chat template" if not tokenizer.chat_template else str(error)
        raise _refused(f"Failed applying chat template to inputs: {why}", "template_error") from error
    assert isinstance(text, str)
    return text


def _refused(why: str, kind: str) -> RequestError:
    return RequestError(why, status=422, error_type=kind)
