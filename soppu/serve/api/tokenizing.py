"""`POST /tokenize`: a text's tokens, with the characters each stands for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from soppu.errors import RequestError
from soppu.serve.api.requests import Encodable
from soppu.serve.refusals import invalid

MAX_CHARACTERS = 100_000  # the list of the answer is made while other requests wait


class TokenizeBody(BaseModel, strict=True):
    """What is tokenized."""

    inputs: Annotated[Encodable, Field(max_length=MAX_CHARACTERS)]
    add_special_tokens: bool | None = None  # None is true


def parse(body: dict[str, Any]) -> TokenizeBody:
    """The body of a request. RequestError 422 names the field."""
    try:
        return TokenizeBody.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise invalid(f"`{fault['loc'][0]}`: {fault['msg']}") from None


def tokenize(tokenizer: PreTrainedTokenizerBase, body: TokenizeBody) -> list[dict[str, Any]]:
    """Every token of the text. RequestError 404 where the tokenizer does not know its offsets."""
    if not tokenizer.is_fast:
        raise RequestError("no fast tokenizer", status=404, error_type="no fast tokenizer")
    special = body.add_special_tokens is not False
    encoding = tokenizer(body.inputs, add_special_tokens=special, return_offsets_mapping=True)
    spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [
        {"id": token, "text": body.inputs[start:stop], "start": start, "stop": stop}
        for token, (start, stop) in spans
    ]
