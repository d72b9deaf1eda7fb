"""What `/v1/models` lists, and which of a name's spellings are understood: the base model's, then users'.

Some routers of fleets read the list whole, and send on only what is in it: see `SOPPU_MODELS_LIMIT`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from starlette.datastructures import QueryParams

from soppu.serve.api.openai.models import MAX_LIMIT, Wanted, listing
from soppu.serve.api.requests import Json
from soppu.serve.vllm_plugin.frontend.control import Control


def models(control: Control, bases: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Name and version of each model: of the base model, "", then of users, then of runtime adapters."""
    yield from ((name, "") for name in bases)
    active = control.bank.active
    yield from ((user, active) for user in control.bank.bundles().get(active, ()))
    yield from ((name, adapter.content_hash) for name, adapter in control.bank.adapters().items())


def body(control: Control, query: QueryParams, cards: Sequence[Json]) -> Json:
    """A page of the list, as vLLM's list is, which has more fields than ours.

    Args:
        cards: vLLM's own of the base model, under each of its names; a user's is like the first.

    Raises:
        RequestError: see `Wanted`.
    """
    limit = control.settings.models_limit
    own = {str(card["id"]): card for card in cards}
    page, more = Wanted.of(query, default=limit, most=max(limit, MAX_LIMIT)).page(models(control, list(own)))
    found = [own.get(name) or user_card(cards[0], name, version) for name, version in page]
    return listing(found, has_more=more)


def user_card(base: Json, name: str, version: str) -> Json:
    """A user's card, from that of the base model."""
    own = {"id": name, "parent": base["id"], "root": f"soppu:{version}", "owned_by": "soppu"}
    return base | own | {"permission": []}


def plain(name: str, bases: Sequence[str]) -> str:
    """A user's name out of "base:user", as Ray Serve LLM writes it; other names as they are."""
    return next((name.removeprefix(f"{base}:") for base in bases if name.startswith(f"{base}:")), name)
