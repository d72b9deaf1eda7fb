"""The settings of users' text: where it comes from, whose it is, how much of it is used."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from soppu.settings import Count, Texts, Whole, allowed, settings

# What a column of text can mean, whatever it is called.
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text")


@settings("data")
class DataConfig:
    """Where users' text comes from, and how much of it is used."""

    source: str = "stdlib"
    users: Texts = ()
    user_from: Literal["auto", "column", "file", "folder"] = "auto"
    user_column: str = "user_id"
    date_column: str = "auto"
    columns: Annotated[Texts, allowed("a list of MEANING=COLUMN")] = ()
    split: str = "train"
    chat_template: str = ""
    on_small_user: Literal["error", "leave-out"] = "error"
    train_examples: Count = 64
    validation_examples: Count = 16
    heldout_examples: Count = 16
    min_examples: Count = 8
    max_tokens: Annotated[Whole, Field(ge=16, le=32768)] = 192

    @field_validator("columns")
    @classmethod
    def _meanings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [
            text for text in value if text.partition("=")[0] not in COLUMNS or not text.partition("=")[2]
        ]:
            raise ValueError(
                f"data.columns = {wrong[0]!r}, allowed: MEANING=COLUMN, MEANING of {', '.join(COLUMNS)}"
            )
        return value
