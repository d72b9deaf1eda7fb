"""The settings of a gateway: one TOML file, and what a caller puts in the place of single keys."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import limits
from pydantic import Field, field_validator, model_validator

from soppu.errors import ConfigError
from soppu.settings import Amount, Count, Flag, Whole, allowed, build, settings

ASYMMETRIC = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
Port = Annotated[Whole, Field(ge=0, le=65535)]
_URL = r"^https?://[^?#\s]+$"  # with a path too, as a router in front of many servers may have
Url = Annotated[str, Field(pattern=_URL), allowed("http://HOST:PORT or https://HOST:PORT")]
Urls = Annotated[tuple[Url, ...], allowed("a list of http://HOST:PORT or https://HOST:PORT")]
Names = Literal["names", "hashed", "none"]  # how users are told of: by id, by a hash of it, not at all


@settings("registry")
class RegistryPlace:
    """Where the catalogue is that says who is served what."""

    root: str = ".soppu/registry"
    catalogue: str = ""  # a SQLAlchemy URL; "" is SQLite inside the root
    create: Flag = False  # an empty one, where there is none yet


@settings("targets")
class Target:
    """A server that users are served by. Without any, those that were published to."""

    url: Url  # as it was published to
    kind: Literal["embedded", "lorax", "vllm"] = "embedded"
    replicas: Urls = ()  # where requests go; () is the url itself
    base_model: str = ""  # what a request for the base model names there; vLLM has to be told
    adapter_source: str = "local"  # of LoRAX's requests, where adapters are


@settings("tls")
class Tls:
    """Files of the certificate, and of its key; "" serves plain HTTP."""

    certificate: str = ""
    key: str = ""


@settings("jwt")
class Jwt:
    """Signed tokens that are taken beside keys; without an issuer none is."""

    issuer: str = ""
    audience: str = ""
    keys: str = ""  # the issuer's JSON Web Key Set: a URL, or a file
    algorithms: Annotated[tuple[Literal[ASYMMETRIC], ...], Field(min_length=1)] = ("RS256",)  # type: ignore[valid-type]
    user_claim: str = "sub"  # whose value is the user's name
    leeway_s: Amount = 30.0  # by which clocks may differ
    longest_s: Amount = 86400.0  # a token that is good for longer is refused

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.issuer and not (self.audience and self.keys and self.user_claim):
            raise ValueError("jwt.issuer needs jwt.audience, jwt.keys and jwt.user_claim")
        return self


@settings("limits")
class Limits:
    """What one request, one user, and all of them together may ask for."""

    requests: str = "120/minute"  # of each user, as the package `limits` writes it; "" is no limit
    tokens: str = ""  # likewise, of prompts and answers
    body_bytes: Annotated[Whole, Field(ge=1024, le=1 << 26)] = 1 << 20
    body_s: Annotated[Amount, Field(gt=0)] = 10.0  # until a body has come
    head_s: Annotated[Amount, Field(gt=0)] = 10.0  # until a request's headers have come
    new_tokens: Count = 2048  # of one text
    texts: Count = 8  # of one request: prompts times `n` or `best_of`
    in_flight: Count = 64  # requests at the targets at once
    waiting: Annotated[Whole, Field(ge=0)] = 256  # and beside those
    waiting_s: Annotated[Amount, Field(gt=0)] = 30.0
    each_user: Count = 16  # requests of one user at once, those that wait too
    answer_s: Annotated[Amount, Field(gt=0)] = 300.0  # until a target says something
    stalled_s: Annotated[Amount, Field(gt=0)] = 30.0  # until a caller takes what is there for them
    connections: Count = 2048

    @field_validator("requests", "tokens")
    @classmethod
    def _rate(cls, value: str, info: Any) -> str:
        try:
            limits.parse_many(value) if value else ()
        except ValueError:
            raise ValueError(
                f'limits.{info.field_name} = {value!r}, allowed: "" or as "120/minute", "5 per second"'
            ) from None
        return value


@settings("")
class GatewaySettings:
    """All of them."""

    host: str = "127.0.0.1"
    port: Port = 8090
    grace_s: Amount = 30.0  # what is under way has so long once the gateway is told to stop
    health_s: Annotated[Amount, Field(gt=0)] = 2.0  # between two looks at a target
    without_adapter: Literal["base", "refuse"] = (
        "base"  # what users get who have none: the base model, or 404
    )
    log_users: Names = "names"
    metric_users: Names = "none"
    open_metrics: Flag = False  # /metrics without an admin key
    registry: RegistryPlace = RegistryPlace()
    targets: tuple[Target, ...] = ()
    tls: Tls = Tls()
    jwt: Jwt = Jwt()
    limits: Limits = field(default_factory=Limits)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if bool(self.tls.certificate) != bool(self.tls.key):
            raise ValueError("tls.certificate and tls.key go together: one of them is missing")
        urls = [one.url.rstrip("/") for one in self.targets]
        if len(set(urls)) < len(urls):
            raise ValueError("targets: a url is named twice")
        return self


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> GatewaySettings:
    """Read a TOML file, or the defaults; `overrides`, keyed "section.key", win.

    Raises:
        ConfigError: the file is absent, is not TOML, or holds faults; all of them are listed.
    """
    source, values = str(path or "gateway"), _read(path)
    for name, value in (overrides or {}).items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{source}: {name}: {section} is no table")
        place[key] = value
    return build(GatewaySettings, values, source=source)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
