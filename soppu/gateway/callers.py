"""Who asks: the one key or signed token of a request, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from soppu.errors import RegistryError
from soppu.gateway.keys import PREFIX, KeyStore, digest_of
from soppu.gateway.lookups import Lookups
from soppu.gateway.refusals import Refused
from soppu.gateway.signed import SignedTokens

_LONGEST = 8192
_WANTED = "a key is needed, as `Authorization: Bearer KEY`"


@dataclass(frozen=True)
class Caller:
    """Whoever shows a good key; `user` is "" of an admin, who reaches no model."""

    user: str
    key: str  # its id, for the log
    admin: bool = False


class Callers:
    """Tells callers by their keys, and by signed tokens where there is an issuer of such."""

    def __init__(self, keys: KeyStore, signed: SignedTokens | None, lookups: Lookups) -> None:
        self._keys = keys
        self._lookups = lookups
        self._signed = signed

    async def of(self, headers: Headers) -> Caller:
        """The caller of a request with these headers. Refused: 401, or 503 as `SignedTokens`."""
        text = _bearer(headers)
        if text.startswith(PREFIX):
            try:
                key = await self._lookups.do(self._keys.by_digest, digest_of(text))
            except RegistryError:
                raise Refused(503, "the keys cannot be read now", after=2) from None
            if key is None or not key.good:
                raise Refused(401, "the key is unknown, revoked or too old")
            return Caller(key.user, key.id, key.admin)
        if self._signed is None:
            raise Refused(401, "the key is unknown, revoked or too old")
        return Caller(await run_in_threadpool(self._signed.user, text), "jwt")

    async def user(self, headers: Headers) -> Caller:
        """The same, who has to be a user. Refused: 403 for an admin."""
        caller = await self.of(headers)
        if caller.admin:
            raise Refused(403, "an admin's key reaches no model: ask with a user's")
        return caller

    async def admin(self, headers: Headers) -> Caller:
        """The same, who has to be an admin. Refused: 403 for a user."""
        caller = await self.of(headers)
        if not caller.admin:
            raise Refused(403, "a user's key is not enough here: an admin's is needed")
        return caller


def _bearer(headers: Headers) -> str:
    given = headers.getlist("authorization")
    if len(given) != 1:
        raise Refused(401, _WANTED if not given else f"{_WANTED}, once; {len(given)} were given")
    scheme, _, text = given[0].partition(" ")
    if (
        scheme.lower() != "bearer"
        or not text
        or text != text.strip()
        or not text.isascii()
        or len(text) > _LONGEST
    ):
        raise Refused(401, _WANTED)
    return text
