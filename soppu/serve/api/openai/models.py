"""The list of models: the base, then everybody who is served; by pages, and by how a name begins."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soppu.errors import RequestError
from soppu.serve.api.requests import Json
from soppu.serve.bank.bank import AdapterBank
from soppu.serve.names import check_name, find_version
from soppu.serve.refusals import invalid
from soppu.user_ids import spellings

DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000


@dataclass(frozen=True)
class Wanted:
    """A page: at most `limit` names that begin with `prefix`, those behind the name `after`."""

    limit: int
    after: str | None = None
    prefix: str = ""

    @classmethod
    def of(cls, query: QueryParams, *, default: int = DEFAULT_LIMIT, most: int = MAX_LIMIT) -> Wanted:
        """What a request asks for. RequestError for a limit outside 1 to `most`."""
        given = query.get("limit", str(default))
        if not (given.isascii() and given.isdigit() and 1 <= int(given[:20]) <= most):
            raise invalid(f"`limit` must be a whole number between 1 and {most}. Given: {given[:80]!r}")
        return cls(int(given), query.get("after"), query.get("prefix", ""))

    def page(self, models: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], bool]:
        """Name and version of each model of the page, and whether there are more. O(models up to its end).

        Raises:
            RequestError: no name is `after`.
        """
        rest = iter(models)
        if self.after is not None and not any(name == self.after for name, _ in rest):
            raise invalid(f"`after` must be the id of a model that is listed. Given: {self.after[:80]!r}")
        fitting = (model for model in rest if model[0].startswith(self.prefix))
        page = list(islice(fitting, self.limit))
        return page, next(fitting, None) is not None


def listing(cards: list[Json], *, has_more: bool) -> Json:
    """The body of a list of models."""
    ends = {"first_id": cards[0]["id"] if cards else None, "last_id": cards[-1]["id"] if cards else None}
    return {"object": "list", "data": cards, **ends, "has_more": has_more}


class ModelsApi:
    """`GET /v1/models` and `GET /v1/models/{id}`."""

    def __init__(self, bank: AdapterBank, *, model_id: str, base_hash: str) -> None:
        self._bank = bank
        self._model_id = model_id
        self._base_hash = base_hash
        self._started = int(time.time())

    def routes(self) -> list[Route]:
        """The route table."""
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.one_model, methods=["GET"]),
        ]

    async def list_models(self, request: Request) -> Response:
        """A page: at most `limit` models, those behind the one with the id `after`, whose id has `prefix`."""
        wanted = Wanted.of(request.query_params)
        page, more = await run_in_threadpool(wanted.page, self._models())
        cards = [self._body(name, version) for name, version in page]
        return JSONResponse(listing(cards, has_more=more))

    async def one_model(self, request: Request) -> Response:
        """One model, also a user's version that is not the active one. 404 where nobody has that id."""
        name: str = request.path_params["id"]
        check_name(name, what="id")
        bundles = self._bank.bundles()
        for one in spellings(name):
            if (version := self._version(one)) is not None:
                return JSONResponse(self._body(one, version))
        user, _, matches = find_version(name, bundles)
        if not (len(matches) == 1 and user in bundles[matches[0]]):
            count = 1 + len(bundles.get(self._bank.active, ()))
            count += len(self._bank.adapters()) + len(self._bank.residents())
            why = f"model {name!r} is not served here; {count} are"
            raise RequestError(why, status=404, error_type="not_found")
        return JSONResponse(self._body(name, matches[0]))

    def _models(self) -> Iterator[tuple[str, str]]:
        """Id and version of each."""
        yield self._model_id, self._base_hash
        active = self._bank.active
        yield from ((user, active) for user in self._bank.bundles().get(active, ()))
        loaded = [*self._bank.adapters().items(), *sorted(self._bank.residents().items())]
        yield from ((name, adapter.content_hash) for name, adapter in loaded)

    def _version(self, name: str) -> str | None:
        """The version of a listed name; None for one that is not listed."""
        if name == self._model_id:
            return self._base_hash
        active = self._bank.active
        if name in self._bank.bundles().get(active, ()):
            return active
        loaded = self._bank.adapters().get(name) or self._bank.residents().get(name)
        return loaded.content_hash if loaded else None

    def _body(self, name: str, version: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started,  # when a version was made is not known here
            "owned_by": "soppu",
            "parent": None if name == self._model_id else self._model_id,
            "version": version,
        }
