"""A system of any number of users to look at, written by what writes a real one.

Adapters come into the registry by `put_adapter`, which takes milliseconds each; beyond `DISTINCT` users hold
the adapters of the first ones, as users of a shared one do, by rows put into the catalogue at once. Reports
are built for `MEASURED` users; those of more repeat their numbers under everybody's names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch

from soppu import files, user_ids
from soppu.adapter import LoraAdapter, LoraPair
from soppu.base_identity import Base
from soppu.evaluate import report
from soppu.evaluate.tradeoff import schema
from soppu.progress import events
from soppu.progress.events import Event
from soppu.registry import Registry
from soppu.registry.catalogue import Catalogue, Holding, User, now
from tests.soppu.evaluate.example import make_inputs
from tests.soppu.evaluate.tradeoff.example import comparison, row

DISTINCT, MEASURED = 100, 200
HASH = "b" * 64
HOSTILE = "<script>document.title='taken'</script>"
HOSTILE_TEXT = "</pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
_GIVEN = "ada ben cleo dara eli fay gus hana ivo juno kit lea max noor".split()
_CHUNK = 10_000


@dataclass(frozen=True)
class Crowd:
    """Where it is, and who is in it."""

    registry: Path
    runs: Path
    users: tuple[str, ...]
    bundle_id: str


def run(number: int) -> str:
    """What a run is called, as long as such names are."""
    return f"demo-a410dfbc843{number}"


def name(number: int) -> str:
    """The id of the user of a number; the last of the alphabet is hostile."""
    return user_ids.to_id(f"{_GIVEN[number % len(_GIVEN)]}.{number:06}@example.com")


def make(folder: Path, users: int, *, url: str = "http://127.0.0.1:9") -> Crowd:
    """A registry, three runs of it, one of them under way, and a comparison of arms. O(users)."""
    names = (*(name(number) for number in range(users - 1)), user_ids.to_id(HOSTILE))
    registry = Registry.open(folder / "registry")
    try:
        for number, user in enumerate(names[:DISTINCT]):
            registry.put_adapter(adapter(number), user=user, run=run(1))
        hold(folder / "registry" / "catalogue.db", names[DISTINCT:], registry.current_set())
        bundles = []
        for number in (1, 2):
            registry.put_adapter(adapter(1000 + number), user=names[0], run=run(number))
            members = registry.freeze_current(Base("tiny", HASH), run=run(number))
            data = f"bundle {number} of {users} users".encode()
            bundles.append(registry.put_bundle(data, set_id=members, run=run(number)))
            registry.record_publication(target="embedded", url=url, bundle_id=bundles[-1])
        held = registry.current_set()
    finally:
        registry.close()
    _runs(folder / "runs", held, bundles)
    return Crowd(folder / "registry", folder / "runs", names, bundles[-1])


def kept(folder: Path, users: int) -> Crowd:
    """The crowd of a folder, made if it is not there; the run under way is one of this process."""
    if not (folder / "whole").exists():
        made = make(folder, users)
        (folder / "whole").write_text("\n".join([made.bundle_id, *made.users]))
    fly(folder / "runs" / run(3))
    bundle_id, *names = (folder / "whole").read_text().split("\n")
    return Crowd(folder / "registry", folder / "runs", tuple(names), bundle_id)


def adapter(seed: int) -> LoraAdapter:
    """A small random one."""
    g = torch.Generator().manual_seed(seed)
    pair = LoraPair(A=torch.randn(2, 4, generator=g), B=torch.randn(3, 2, generator=g))
    return LoraAdapter({"model.layers.0.self_attn.q_proj": pair}, base_model="tiny", base_hash=HASH)


def hold(catalogue: Path, users: tuple[str, ...], held: dict[str, str]) -> None:
    """Rows of users and of what they hold, many in a statement."""
    adapters, at = list(held.values()), now()
    opened = Catalogue.open(f"sqlite:///{catalogue}", create=False)
    common = {"run": run(1), "metrics": {}, "at": at}
    for start in range(0, len(users), _CHUNK):
        chunk = users[start : start + _CHUNK]
        with opened.write() as session:
            rows = [{"id": one, "holding_id": None, "created_at": at, "forgotten_at": None} for one in chunk]
            session.execute(sa.insert(User), rows)
            has = [
                {"user_id": one, "adapter_id": adapters[(start + n) % len(adapters)], **common}
                for n, one in enumerate(chunk)
            ]
            session.execute(sa.insert(Holding), has)
            newest = sa.select(Holding.id).where(Holding.user_id == User.id).scalar_subquery()
            session.execute(sa.update(User).where(User.holding_id.is_(None)).values(holding_id=newest))
    opened.close()


def _runs(root: Path, held: dict[str, str], bundles: list[str]) -> None:
    for number, bundle_id in enumerate(bundles, 1):
        folder = root / run(number)
        folder.mkdir(parents=True)
        day = f"2026-01-0{number}T03:04:05+00:00"
        inputs = make_inputs(
            users=list(held)[:MEASURED], run=folder.name, bundle_id=bundle_id, created=day,
            bytes_before=1_230_000 * len(held), bytes_after=1_300_000 + 33_000 * len(held),
        )  # fmt: skip
        built = report.build(inputs)
        report.write(folder, built)
        files.write_text(folder / report.JSON_FILE, json.dumps(_of_everybody(built, held), indent=2))
    _compared(root / run(2), list(held))
    fly(root / run(3))


def fly(flying: Path) -> None:
    """A run of this process, which is in its second stage."""
    flying.mkdir(exist_ok=True)
    (flying / "config.toml").write_text("")
    began = Event(1.0, "run", "began", stages=("prepare", "federate", "compress"), **events.this_process())
    for event in (
        began,
        Event(2.0, "prepare", "began", pid=began.pid),
        Event(3.0, "prepare", "done", seconds=1.0, pid=began.pid),
        Event(4.0, "federate", "began", pid=began.pid),
    ):
        events.append(flying, event)
    tell(flying, share=0.4)


def tell(flying: Path, *, share: float) -> None:
    """How far the run under way is, which is one of this process."""
    pid, note = events.this_process()["pid"], f"round 2 of 3: {HOSTILE}"
    events.append(flying, Event(5.0, "federate", note=note, share=share, round=2, rounds=3, pid=pid))


def _of_everybody(built: dict[str, Any], held: dict[str, str]) -> dict[str, Any]:
    """The report with a row for every user, and an error in every module."""
    rows, names = built["users"], list(held)
    users = [{**rows[n % len(rows)], "id": one, "adapter_id": held[one]} for n, one in enumerate(names)]
    modules = {
        module: dict(zip(names, _again(list(errors.values()), len(names)), strict=True))
        for module, errors in built["compression"]["by_module"].items()
    }
    return {**built, "users": users, "compression": {**built["compression"], "by_module": modules}}


def _again(values: list[float], count: int) -> Iterator[float]:
    return (values[n % len(values)] for n in range(count))


def _compared(folder: Path, users: list[str]) -> None:
    """Two arms and two examples of everybody."""
    arms = ("base", "residual@16")
    rows = [row(user, arm) for user in users for arm in arms]
    told = comparison(run=folder.name, rows=rows)
    (folder / schema.FILE).write_text(json.dumps(told))
    said = {
        "prompt": "def total(rows):\n",
        "reference": "    return sum(rows)\n",
        "texts": {"base": HOSTILE_TEXT, "residual@16": "    return sum(row.price for row in rows)\n"},
        "losses": {"base": 2.41, "residual@16": 1.87},
    }
    with (folder / told["texts"]).open("w") as out:
        for user in users:
            for _ in range(2):
                out.write(json.dumps({"user": user, **said}) + "\n")
