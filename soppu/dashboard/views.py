"""What each page shows: a view asks the catalogue and what the watcher has seen, and fills a template."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from starlette.requests import Request

from soppu import user_ids
from soppu.dashboard import wording
from soppu.dashboard.reading import RunLine
from soppu.dashboard.runs import PAGES, Runs, Standing
from soppu.dashboard.watcher import Watcher
from soppu.errors import NotThere, RegistryError, SoppuError
from soppu.evaluate.templates import environment
from soppu.registry import Registry

_PAGE = 50  # users or runs of a page
_LONGEST = 200  # characters of what is searched for
_HOLDERS = 20  # users beside an adapter
_NEWEST = 10  # runs beside the fleet
_DRAWN = 30  # runs of a sparkline


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
    lines = house.runs.lines()
    return _render(
        "fleet.html",
        house,
        here="fleet",
        users=house.registry.user_count(),
        places=house.registry.in_force(),
        servers=house.watcher.servers,
        flights=house.runs.flights(),
        runs=_standing(house, lines[:_NEWEST]),
        count=len(lines),
        last=next((line for line in lines if line.gain), None),
        gains=[line.gain["mean"] for line in reversed(lines[:_DRAWN]) if line.gain],
    )


def runs(house: House, request: Request) -> str:
    """Every run, newest first, a page at a time."""
    asked = request.query_params.get("after", "")
    after = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 10 else 0
    lines = house.runs.lines()
    return _render(
        "runs.html", house, here="runs", runs=_standing(house, lines[after : after + _PAGE]), after=after,
        count=len(lines), more=len(lines) > after + _PAGE, page=_PAGE,
        previous=max(0, min(after, len(lines)) - _PAGE),
    )  # fmt: skip


def users(house: House, request: Request) -> str:
    """A page of users, searched for by a part of their id or name."""
    asked = request.query_params.get("q", "").strip()[:_LONGEST]
    after, before = (request.query_params.get(name, "")[:_LONGEST] for name in ("after", "before"))
    page = house.registry.user_page(holding=_searched(asked), after=after, before=before, limit=_PAGE)
    found = house.runs.of_users([line.user for line in page.rows])
    measured = {who: runs[0][1] if runs else None for who, runs in found.items()}
    return _render(
        "users.html", house, here="users", asked=asked, page=page, measured=measured,
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
    measured = house.runs.of_users([who])[who]
    found = ((line, house.runs.texts(line.name, who)) for line, _ in measured)
    run, texts = next(((line, some) for line, some in found if some), (None, []))
    return _render(
        "user.html", house, here="users", user=who, history=history[::-1], addresses=addresses,
        measured=measured, traffic=house.watcher.of_user(who), run=run, texts=texts,
        waits=[line.name for line in house.runs.lines() if line.waits],
    )  # fmt: skip


def adapter(house: House, request: Request) -> str:
    """One adapter: whose it is and was, where it is served."""
    asked = request.path_params["adapter"]
    found = house.registry.held(asked, limit=_HOLDERS + 1)
    if not found:
        raise NotThere(f"nobody holds an adapter {_short(asked)!r}")
    rows = found[:_HOLDERS]
    holders = list(dict.fromkeys(who for who, _ in rows))
    measured = [
        (who, line, facts)
        for who, told in house.runs.of_users(holders).items()
        for line, facts in told
        if facts.get("adapter_id") == asked
    ]
    size, told = _size(house, asked), house.registry.told_in([asked])
    basis = next((one for one in house.registry.bases() if one.basis_id == told.get(asked)), None)
    return _render(
        "adapter.html", house, here="users", adapter=asked, rows=rows, measured=measured, size=size,
        basis=basis, more=len(found) > _HOLDERS,
    )  # fmt: skip


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
    pages = {name: said for name, said in PAGES.items() if (line.path / name).is_file()}
    return _render(
        "run.html", house, here="runs", line=line, flight=house.runs.flights().get(asked), pages=pages,
        standing=house.runs.standing(line),
    )  # fmt: skip


def problem(house: House, status: int, what: str) -> str:
    """A page that says what is wrong."""
    return _render("problem.html", house, here="", status=status, what=what)


def _standing(house: House, lines: Sequence[RunLine]) -> list[tuple[RunLine, Standing]]:
    return [(line, house.runs.standing(line)) for line in lines]


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
    pages = environment("dashboard/templates", finalize=wording.shown)
    pages.filters |= wording.FILTERS
    pages.globals |= {"link": link, "sparkline": wording.sparkline}
    return pages


def link(*parts: str) -> str:
    """A path of these parts, each escaped."""
    return "/" + "/".join(quote(part, safe="") for part in parts)
