"""The list of models: the base, then everybody who is served."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

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
        """A page: at most `limit` models, those behind the one with the id `after`."""
        limit, after = _limit(request.query_params), request.query_params.get("after")
        models = list(self._models())
        start = 0 if after is None else _behind(after, (name for name, _ in models))
        page = [self._body(name, version) for name, version in models[start : start + limit]]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": start + limit < len(models),
            }
        )

    async def one_model(self, request: Request) -> Response:
        """One model, also a user's version that is not the active one. 404 where nobody has that id."""
        name: str = request.path_params["id"]
        check_name(name, what="id")
        listed, bundles = dict(self._models()), self._bank.bundles()
        name = next((one for one in spellings(name) if one in listed), name)
        user, _, matches = find_version(name, bundles)
        if name not in listed and not (len(matches) == 1 and user in bundles[matches[0]]):
            why = f"model {name!r} is not served here; {len(listed)} are"
            raise RequestError(why, status=404, error_type="not_found")
        return JSONResponse(self._body(name, listed[name] if name in listed else matches[0]))

    def _models(self) -> Iterator[tuple[str, str]]:
        """Id and version of each."""
        yield self._model_id, self._base_hash
        active = self._bank.active
        for user in self._bank.bundles().get(active, ()):
            yield user, active
        for name, adapter in self._bank.adapters().items():
            yield name, adapter.content_hash
        for path, adapter in sorted(self._bank.residents().items()):
            yield path, adapter.content_hash

    def _body(self, name: str, version: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._started,  # when a version was made is not known here
            "owned_by": "soppu",
            "parent": None if name == self._model_id else self._model_id,
            "version": version,
        }


def _limit(query: QueryParams) -> int:
    given = query.get("limit", str(DEFAULT_LIMIT))
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:20]) <= MAX_LIMIT):
        raise invalid(f"`limit` must be a whole number between 1 and {MAX_LIMIT}. Given: {given[:80]!r}")
    return int(given)


def _behind(after: str, names: Iterable[str]) -> int:
    for position, name in enumerate(names):
        if name == after:
            return position + 1
    raise invalid(f"`after` must be the id of a model that is listed. Given: {after[:80]!r}")
