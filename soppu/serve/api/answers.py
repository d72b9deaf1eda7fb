"""The shape of every answer, for the OpenAPI document and its tests. They are built in `api.responses`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, RootModel

from soppu.serve.bank.newcomers import Join


class Error(BaseModel):
    """LoRAX's error object."""

    error: str
    error_type: str


class AlternativeToken(BaseModel):
    """A token that was likely too."""

    id: int
    text: str
    logprob: float


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: list[AlternativeToken] | None = None


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None = None


class _Ending(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None


class BestOfSequence(_Ending):
    """One of the other sequences of `best_of`."""

    generated_text: str
    prefill: list[PrefillToken]
    tokens: list[Token]


class Routed(BaseModel):
    """Which arm answered, and which one the router's policy would take; `why` where it is not the same."""

    mode: str
    arm: str
    policy: str | None = None
    choice: str | None = None
    why: str | None = None


class StreamDetails(_Ending):
    """How a stream ended; `router` where the server has one."""

    prompt_tokens: int
    router: Routed | None = None


class Details(StreamDetails):
    """How a generation ended, and its tokens."""

    skipped_tokens: int
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class Generated(BaseModel):
    """A whole answer."""

    generated_text: str
    details: Details | None = None


class GeneratedList(RootModel[list[Generated]]):
    """A whole answer, as a list of one."""


class StreamEvent(BaseModel):
    """One event of a stream."""

    token: Token
    generated_text: str | None
    details: StreamDetails | None


class Info(BaseModel, extra="forbid"):
    """What the server serves, and its limits."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
    server: str = Field(description="Not of LoRAX, as all that follows")
    base_hash: str
    active_bundle: str
    bundles: int
    adapters: int
    max_batch: int
    waiting: int
    running: int


class SimpleToken(BaseModel):
    """A token of a text, and the characters it stands for."""

    id: int
    text: str
    start: int
    stop: int


class Tokenized(RootModel[list[SimpleToken]]):
    """The tokens of a text."""


class Family(BaseModel):
    """All series of one figure."""

    type: str
    data: list[dict[str, str | float]]


class Figures(RootModel[dict[str, Family]]):
    """Every figure by its name."""


class Document(RootModel[dict[str, Any]]):
    """An OpenAPI document."""


class HeldBundle(BaseModel):
    """A bundle in memory."""

    bundle_id: str
    active: bool
    users: list[str]


class Bundles(BaseModel):
    """Every bundle in memory; `active` is the id of the one that plain names are served from."""

    active: str
    bundles: list[HeldBundle]


class Put(BaseModel):
    """A bundle that is there now."""

    bundle_id: str
    new: bool


class Switched(BaseModel):
    """The bundle that is active now, and the one that was; "" is none."""

    active: str
    previous: str


class Deleted(BaseModel):
    """What is no longer there."""

    deleted: str


class HeldAdapter(BaseModel):
    """A PEFT adapter in memory; `base_verified`: it states the hash of this server's base model."""

    name: str
    content_hash: str
    rank: int
    base_verified: bool


class Adapters(BaseModel):
    """Every PEFT adapter in memory."""

    adapters: list[HeldAdapter]


class Named(BaseModel):
    """An adapter that is there now."""

    name: str


class User(BaseModel):
    """What is answered for a user now; `loaded` is all that may be asked for, each for good."""

    user: str
    active_bundle: str
    adapter_id: str
    version: str
    loaded: list[str]


class NewJoin(Join, frozen=True):
    """As told to who joins; `new` is false where the core was there already."""

    new: bool


class KeptJoin(Join, frozen=True):
    """As kept for a registry, under a number."""

    number: int


class Joined(BaseModel):
    """Everybody who joined at the server and is in no registry yet, in order."""

    joined: list[KeptJoin]
