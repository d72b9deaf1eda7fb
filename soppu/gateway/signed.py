"""Signed tokens (JWT) of one issuer, as OpenID Connect gives them: verified by PyJWT, read as a user's id."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from jwt import PyJWK, PyJWKClient, PyJWKSet

from soppu import user_ids
from soppu.errors import ConfigError, DataError
from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Jwt

_FETCH_SECONDS = 5.0
_LONGEST = 8192
_NEEDED = ["exp", "iat", "iss", "aud"]


class SignedTokens:
    """What verifies tokens by `settings`; `user` blocks while it fetches the issuer's keys.

    A token names its key by `kid` and nothing else: `jku`, `x5u` and a key inside it are not looked at.
    """

    def __init__(self, settings: Jwt) -> None:
        self._settings = settings
        self._key = _source(settings.keys)

    def user(self, token: str) -> str:
        """The id of the user that a token is of.

        Raises:
            Refused: 401, the token is not good here, or its claim can be nobody's name; 503, the issuer's
                keys cannot be had.
        """
        claims = self._claims(token)
        lasts = claims["exp"] - claims["iat"]
        if lasts > self._settings.longest_s:
            raise _bad(f"it is good for {lasts} s, at most {self._settings.longest_s:.0f} are taken")
        return _user(claims.get(self._settings.user_claim), self._settings.user_claim)

    def _claims(self, token: str) -> dict[str, Any]:
        wanted = self._settings
        try:
            if len(token) > _LONGEST:
                raise jwt.InvalidTokenError(f"it has {len(token)} characters, at most {_LONGEST} are taken")
            kid = jwt.get_unverified_header(token).get("kid")
            if not isinstance(kid, str):
                raise jwt.InvalidTokenError("it names no key by `kid`")
            return jwt.decode(
                token,
                self._key(kid),
                algorithms=list(wanted.algorithms),
                audience=wanted.audience,
                issuer=wanted.issuer,
                leeway=wanted.leeway_s,
                options={"require": _NEEDED, "verify_sub": False},
            )
        except jwt.PyJWKClientConnectionError:
            raise Refused(503, "the keys of the tokens' issuer cannot be had now", after=5) from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise _bad(str(error)) from None


def _bad(why: str) -> Refused:
    return Refused(401, f"the signed token is not taken: {why[:200]}")


def _user(value: object, claim: str) -> str:
    """The id of the user of this name, so that no two names that an issuer can give are one id here."""
    if not isinstance(value, str):
        raise _bad(f"its claim {claim!r} is no text")
    if "%" in value or unicodedata.normalize("NFC", value) != value:
        # "alice%40x" would be the id of "alice@x", and two forms of one character one id
        raise _bad(
            f"its claim {claim!r} holds a percent sign, or characters that are not in Unicode's form C"
        )
    try:
        return user_ids.to_id(value)
    except DataError as error:
        raise _bad(str(error)) from None


def _source(place: str) -> Callable[[str], PyJWK]:
    """What gives the key of a `kid`: fetched from a URL, and again for a new one; or out of a file."""
    if place.startswith(("http://", "https://")):
        return PyJWKClient(place, timeout=_FETCH_SECONDS).get_signing_key
    try:
        known = PyJWKSet.from_dict(json.loads(Path(place).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, jwt.PyJWTError) as error:
        raise ConfigError(
            f"jwt.keys = {place!r}, allowed: a URL or a file of a JSON Web Key Set: {error}"
        ) from None

    def find(kid: str) -> PyJWK:
        for key in known.keys:
            if key.key_id == kid and key.public_key_use in ("sig", None):
                return key
        raise jwt.InvalidTokenError("its key is none of the issuer's")

    return find
