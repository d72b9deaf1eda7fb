"""What each page shows: a view asks the catalogue and what the watcher has seen, and fills a template."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from starlette.requests import Request

from soppu import user_ids
from soppu.dashboard import wording
from soppu.dashboard.runs import PAGES, Runs
from soppu.dashboard.watcher import Watcher
from soppu.errors import NotThere, RegistryError, SoppuError
from soppu.evaluate.templates import environment
from soppu.registry import Registry

_PAGE = 50  # users of a page
_LONGEST = 200  # characters of what is searched for
_RUNS = 30


@dataclass(frozen=True)
class House:
    """What is looked at."""

    registry: Registry
    runs: Runs
    watcher: Watcher
    name: str  # of the registry, for people


def fleet(house: House, request: Request) -> str:
    """All of it at a glance."""
    del request
    return _render(
        "fleet.html",
        house,
        here="fleet",
        users=house.registry.user_count(),
        places=house.registry.in_force(),
        servers=house.watcher.servers,
        flights=house.runs.flights(),
        runs=house.runs.lines()[:_RUNS],
        gains=[line.gain["mean"] for line in reversed(house.runs.lines()[:_RUNS]) if line.gain],
    )


def users(house: House, request: Request) -> str:
    """A page of users, searched for by a part of their id or name."""
    asked = request.query_params.get("q", "").strip()[:_LONGEST]
    after = request.query_params.get("after", "")[:_LONGEST]
    page = house.registry.user_page(holding=_searched(asked), after=after, limit=_PAGE)
    found = {line.user: house.runs.of_user(line.user) for line in page.rows}
    measured = {who: runs[0][1] if runs else None for who, runs in found.items()}
    return _render(
        "users.html", house, here="users", asked=asked, after=after, page=page, measured=measured,
        total=house.registry.user_count(),
    )  # fmt: skip


def user(house: House, request: Request) -> str:
    """One user: losses, versions, where served, traffic, examples."""
    asked = request.path_params["user"]
    try:
        who = asked if user_ids.is_id(asked) else user_ids.to_id(asked)
        history = house.registry.history(who)
    except SoppuError as error:
        raise NotThere(f"there is no user {_short(asked)!r}: {_short(str(error))}") from error
    addresses = house.registry.resolve(who) if history else []
    measured = house.runs.of_user(who)
    found = ((line, house.runs.texts(line.name, who)) for line, _ in measured)
    run, texts = next(((line, some) for line, some in found if some), (None, []))
    return _render(
        "user.html", house, here="users", user=who, history=history[::-1], addresses=addresses,
        measured=measured, traffic=house.watcher.of_user(who), run=run, texts=texts,
    )  # fmt: skip


def adapter(house: House, request: Request) -> str:
    """One adapter: whose it is and was, where it is served."""
    asked = request.path_params["adapter"]
    holders = house.registry.holders(asked)
    if not holders:
        raise NotThere(f"nobody holds an adapter {_short(asked)!r}")
    rows = [(who, row) for who in holders for row in house.registry.history(who) if row.adapter_id == asked]
    measured = [
        (who, line, facts)
        for who in holders
        for line, facts in house.runs.of_user(who)
        if facts.get("adapter_id") == asked
    ]
    size = _size(house, asked)
    return _render(
        "adapter.html", house, here="users", adapter=asked, rows=rows, measured=measured, size=size
    )


def bundle(house: House, request: Request) -> str:
    """One bundle: from which set, by which run, where it is and was served."""
    asked = request.path_params["bundle"]
    try:
        row = house.registry.bundle(asked)
    except RegistryError as error:
        raise NotThere(f"there is no bundle {_short(asked)!r}") from error
    places = [one for one in house.registry.publications() if one.bundle_id == row.id]
    live = {one.bundle_id for one in house.registry.in_force()}
    lines = [line for line in house.runs.lines() if line.bundle_id == row.id]
    return _render(
        "bundle.html", house, here="fleet", bundle=row, places=places, live=row.id in live, lines=lines
    )


def run(house: House, request: Request) -> str:
    """One run: how it ended or how far it is."""
    asked = request.path_params["run"]
    line = house.runs.line(asked)
    if line is None:
        raise NotThere(f"there is no run {_short(asked)!r} here")
    pages = [name for name in PAGES if (line.folder / name).is_file()]
    return _render(
        "run.html", house, here="fleet", line=line, flight=house.runs.flights().get(asked), pages=pages
    )


def problem(house: House, status: int, what: str) -> str:
    """A page that says what is wrong."""
    return _render("problem.html", house, here="", status=status, what=what)


def _searched(asked: str) -> str:
    """A name as its id would hold it; what is no part of a name as it was typed."""
    return asked if not asked or user_ids.is_id(asked) else quote(asked, safe="%")


def _size(house: House, adapter_id: str) -> int | None:
    try:
        return house.registry.adapter_bytes(adapter_id)
    except SoppuError:
        return None  # its blob was removed


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _render(template: str, house: House, **values: Any) -> str:
    return _environment().get_template(template).render(registry=house.name, **values)


@functools.cache
def _environment() -> Environment:
    pages = environment("dashboard/templates")
    pages.filters |= wording.FILTERS
    pages.globals |= {"link": link, "sparkline": wording.sparkline}
    return pages


def link(*parts: str) -> str:
    """A path of these parts, each escaped."""
    return "/" + "/".join(quote(part, safe="") for part in parts)
