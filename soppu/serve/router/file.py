"""router.json: what a router was fitted from, for which base model and bundle, and how it was judged."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soppu import files
from soppu.errors import RouterError
from soppu.serve.router import policies
from soppu.serve.router.measured import BASE, PERSONAL, Arm, Floats, Measured, Questions
from soppu.serve.router.policies import Options, Policy

FORMAT = 1
_CURE = "fit it again with `soppu router fit`"
_Whole = Annotated[int, Field(ge=1)]
_Real = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Base(_Part):
    name: str
    hash: str


class _Arm(_Part):
    name: str
    adapter: str
    bytes: _Real


class _Prompt(_Part):
    user: str
    digest: str
    length: _Whole
    tokens: _Whole
    vector: str
    losses: list[_Real]
    reading: list[_Real]


class _File(_Part):
    format: int
    id: str
    base: _Base
    bundle_id: str
    run: str
    layer: _Whole
    prompt_tokens: _Whole
    policy: str
    why: str
    neighbours: _Whole
    tolerance: _Real
    arms: list[_Arm]
    prior: dict[str, list[_Real]]
    prior_from: str
    table: list[dict[str, Any]]
    prompts: Annotated[list[_Prompt], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> _File:
        names = [arm.name for arm in self.arms]
        if names[:2] != [BASE, PERSONAL] or len(set(names)) < len(names):
            raise ValueError(f"arms are {', '.join(names)}, allowed: base, personal, and others, each once")
        if self.policy not in (allowed := policies.names(names)):
            raise ValueError(f"policy {self.policy!r}, allowed: {', '.join(allowed)}")
        lists = [
            *self.prior.values(),
            *(one.losses for one in self.prompts),
            *(p.reading for p in self.prompts),
        ]
        if any(len(one) != len(names) for one in lists):
            raise ValueError(f"a prompt or user has not one number for each of {len(names)} arms")
        return self


@dataclass(frozen=True, eq=False)
class RouterFile:
    """A fitted router. `layer`: states are taken after so many layers, of the last `prompt_tokens` tokens."""

    base_name: str
    base_hash: str
    bundle_id: str
    run: str
    layer: int
    prompt_tokens: int
    policy: str  # the one that is used where nothing else is asked for
    why: str
    prior_from: str
    options: Options
    measured: Measured
    table: tuple[Mapping[str, Any], ...]  # what cross-validation found of each policy
    id: str = ""  # hash of all that; given where the file is written or read

    def fitted(self, name: str = "") -> Policy:
        """A policy, the file's own for "". RouterError for a name that there is not."""
        return policies.fit(name or self.policy, self.measured, self.options)


def write(path: Path, router: RouterFile) -> str:
    """Write it, atomically; its id. Raises StorageError."""
    values = _values(router)
    values["id"] = _digest(values)
    files.write_text(path, json.dumps(values, indent=1) + "\n")
    return str(values["id"])


def read(path: Path) -> RouterFile:
    """Read it. RouterError where it is absent, damaged, or not a router's file of this format."""
    try:
        values = files.read_object(path, error=RouterError, cure=_CURE)
    except (FileNotFoundError, NotADirectoryError):
        raise RouterError(f"{path}: no such file; make it with `soppu router fit RUN_DIR`") from None
    if values.get("format") != FORMAT:
        raise RouterError(f"{path}: format {values.get('format')!r}, allowed: {FORMAT}; {_CURE}")
    if values.get("id") != (found := _digest(values)):
        raise RouterError(f"{path}: id {values.get('id')!r}, its content has {found!r}: changed; {_CURE}")
    try:
        return _router(_File.model_validate(values))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"])) or "file"
        raise RouterError(f"{path}: {where}: {fault['msg']}; {_CURE}") from None
    except ValueError as error:
        raise RouterError(f"{path}: {error}; {_CURE}") from None


def _digest(values: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in values.items() if name != "id"}
    return "r-" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _values(router: RouterFile) -> dict[str, Any]:
    options, measured = router.options, router.measured
    return {
        "format": FORMAT,
        "id": "",
        "base": {"name": router.base_name, "hash": router.base_hash},
        "bundle_id": router.bundle_id,
        "run": router.run,
        "layer": router.layer,
        "prompt_tokens": router.prompt_tokens,
        "policy": router.policy,
        "why": router.why,
        "neighbours": options.neighbours,
        "tolerance": options.tolerance,
        "arms": [vars(arm) for arm in options.arms],
        "prior": {user: list(map(float, losses)) for user, losses in options.prior.items()},
        "prior_from": router.prior_from,
        "table": [dict(row) for row in router.table],
        "prompts": [_prompt(measured, place) for place in range(len(measured))],
    }


def _prompt(measured: Measured, place: int) -> dict[str, Any]:
    asked = measured.asked
    return {
        "user": asked.users[place],
        "digest": measured.digests[place],
        "length": int(asked.lengths[place]),
        "tokens": int(measured.tokens[place]),
        "losses": [float(f"{value:.8g}") for value in measured.losses[place]],
        "reading": [float(f"{value:.8g}") for value in asked.reading[place]],
        "vector": base64.b64encode(asked.vectors[place].astype("<f4").tobytes()).decode(),
    }


def _router(found: _File) -> RouterFile:
    prompts = found.prompts
    asked = Questions(
        [one.user for one in prompts],
        np.array([one.length for one in prompts], dtype=np.int64),
        _vectors(prompts),
        np.array([one.reading for one in prompts], dtype=np.float64),
    )
    measured = Measured(
        asked,
        [one.digest for one in prompts],
        np.array([one.tokens for one in prompts], dtype=np.int64),
        np.array([one.losses for one in prompts], dtype=np.float64),
    )
    arms = [Arm(one.name, one.adapter, one.bytes) for one in found.arms]
    return RouterFile(
        found.base.name,
        found.base.hash,
        found.bundle_id,
        found.run,
        found.layer,
        found.prompt_tokens,
        found.policy,
        found.why,
        found.prior_from,
        Options(arms, found.neighbours, found.tolerance, found.prior),
        measured,
        tuple(found.table),
        found.id,
    )


def _vectors(prompts: list[_Prompt]) -> Floats:
    """(n, d). ValueError where they are not all of one width, or not finite."""
    rows = [np.frombuffer(base64.b64decode(one.vector, validate=True), dtype="<f4") for one in prompts]
    if len({len(row) for row in rows}) > 1 or not len(rows[0]):
        raise ValueError("vectors of prompts differ in width")
    vectors = np.stack(rows).astype(np.float64)
    if not np.isfinite(vectors).all():
        raise ValueError("a vector of a prompt is not finite")
    return vectors
