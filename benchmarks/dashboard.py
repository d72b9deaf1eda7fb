"""How fast the live page is while the server that it looks at is at work: benchmarks/results/dashboard.json.

    python -m benchmarks.dashboard [--users 10 --users 1000 --users 100000] [--rounds 60] [--folder DIR]

For each number of users: a registry and runs as `tests/soppu/dashboard/crowd.py` writes them, and a real
`soppu serve` of the embedded base model with a bundle in which the first thousand of them are, asked without
a pause by a process of its own. Then `soppu dashboard` is started, and every view is asked for in turn, of
another user each time: milliseconds from the request to the last byte. `while_reading` is the fleet's view
from the start until the last report was read, where there are reports large enough to be read beside.
`first_paint_ms` is what Chromium says of each view once, on the same two cores. `rss` is the page's process
in bytes, when it listens and at the end.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import psutil
import requests

from benchmarks import load, served
from benchmarks.load import Endpoint, Traffic
from benchmarks.record import circumstances, store
from benchmarks.serve import server
from soppu import user_ids
from soppu.compress import Bundle
from soppu.registry import Registry
from tests.soppu.dashboard import browser, crowd
from tests.soppu.dashboard.crowd import Crowd

SERVED, UNDER_WAY, TOKENS = 1000, 4, 32
_PAINT = """
const painted = performance.getEntriesByName("first-contentful-paint")[0];
return painted ? painted.startTime : null;
"""


def bundle(names: tuple[str, ...]) -> Bundle:
    """Random cores of these users in one basis a module."""
    made = served.bundle(len(names))
    whose = dict(zip(made.users, names, strict=True))
    report = made.report
    errors = {whose[user]: error for user, error in report.relative_error.items()}
    modules = {
        module: {whose[user]: error for user, error in found.items()}
        for module, found in report.module_error.items()
    }
    return replace(made, users=names, report=replace(report, relative_error=errors, module_error=modules))


@contextmanager
def serving(folder: Path, names: tuple[str, ...]) -> Iterator[int]:
    """The embedded server with a bundle of these users, asked without a pause; its port."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle(names).save(folder / "served.soppu")
    words = ["-m", "soppu.cli", "serve", "--port", "{port}", "--model", str(served.base().path)]
    words += ["--state", str(folder / "state"), "--bundle", str(folder / "served.soppu"), "--max-batch", "4"]
    with server(folder, "embedded", [str(browser.SOPPU.with_name("python")), *words], {}) as (port, _):
        asking = multiprocessing.get_context("spawn").Process(target=ask, args=(port, names), daemon=True)
        asking.start()
        try:
            while _requests(port) < UNDER_WAY:
                time.sleep(0.2)
            yield port
        finally:
            asking.terminate()
            asking.join()


def ask(port: int, names: tuple[str, ...]) -> None:
    """Requests of many users, so many under way at any time, until the process is ended."""
    for seed in itertools.count():
        wanted = load.asks(Traffic(names), requests=64, tokens=TOKENS, seed=seed)
        load.measure(Endpoint(port, "lorax"), wanted, concurrency=UNDER_WAY)


def _requests(port: int) -> float:
    lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text.splitlines()
    told = [line.rsplit(" ", 1)[1] for line in lines if line.startswith("lorax_request_success ")]
    return sum(map(float, told))


def paths(made: Crowd, registry: Registry, draw: random.Random) -> dict[str, str]:
    """A path of every view, of users drawn anew."""
    user, other = draw.choice(made.users), draw.choice(made.users)
    return {
        "fleet": "/",
        "users": "/users",
        "users, further on": f"/users?after={quote(other)}",
        "search, many": "/users?q=cleo",
        "search, one": f"/users?q={quote(user_ids.name_of(other))}",
        "search, nobody": f"/users?q=nobody{draw.randrange(10**6)}",
        "a user": f"/users/{quote(user, safe='')}",
        "a version": f"/adapters/{registry.current(user)}",
        "a bundle": f"/bundles/{made.bundle_id}",
        "runs": "/runs",
        "a run": f"/runs/{crowd.run(2)}",
    }


def timed(session: requests.Session, url: str) -> float:
    """Milliseconds until the whole page has come."""
    began = time.perf_counter()
    answer = session.get(url, timeout=120)
    answer.raise_for_status()
    return 1e3 * (time.perf_counter() - began)


def told(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile, most."""
    ordered = sorted(values)
    p99 = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    return {"p50": statistics.median(ordered), "p99": p99, "max": ordered[-1], "count": len(ordered)}


def while_reading(session: requests.Session, url: str) -> dict[str, Any] | None:
    """The fleet's view until no report waits any more; None where none did."""
    began, took = time.perf_counter(), []
    while "being read" in session.get(f"{url}/runs", timeout=120).text:
        took += [timed(session, f"{url}/") for _ in range(5)]
    return {"seconds": time.perf_counter() - began, "ms": told(took)} if took else None


def painted(url: str, views: dict[str, str]) -> dict[str, float]:
    """First contentful paint of every view in Chromium, milliseconds."""
    found = {}
    with browser.chromium() as driver:
        driver.get(f"{url}/health")  # the browser itself has started
        for name, path in views.items():
            driver.get(url + path)
            end = time.monotonic() + 10
            while (paint := driver.execute_script(_PAINT)) is None and time.monotonic() < end:
                time.sleep(0.05)
            found[name] = paint
    return found


def measure(folder: Path, made: Crowd, *, rounds: int) -> dict[str, Any]:
    """One number of users."""
    names, draw = made.users[:SERVED], random.Random(0)
    registry = Registry.open(made.registry, create=False)
    with ExitStack() as stack:
        stack.callback(registry.close)
        port = stack.enter_context(serving(folder, names))
        target = f"embedded=http://127.0.0.1:{port}"
        page = browser.dashboard(made.registry, made.runs, "--target", target)
        url, process = stack.enter_context(page)
        known, session = psutil.Process(process.pid), requests.Session()
        timed(session, f"{url}/")
        rss, reading = [known.memory_info().rss], while_reading(session, url)
        before, began = _requests(port), time.perf_counter()
        took: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, path in paths(made, registry, draw).items():
                took.setdefault(name, []).append(timed(session, url + path))
        seconds = time.perf_counter() - began
        asked = (_requests(port) - before) / seconds
        rss.append(known.memory_info().rss)
        paint = painted(url, paths(made, registry, draw))
    return {
        "users": len(made.users),
        "served": len(names),
        "server_requests_per_second": asked,
        "ms": {name: told(values) for name, values in took.items()},
        "while_reading": reading,
        "first_paint_ms": paint,
        "rss": {"start": rss[0], "end": rss[1]},
    }


@click.command()
@click.option("--users", "counts", type=int, multiple=True, default=(10, 1000, 100_000), show_default=True)
@click.option("--rounds", default=60, show_default=True, help="How often every view is asked for.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Keeps what is looked at; what is there is used."
)
@click.option("--prepare", is_flag=True, help="Only write what is looked at.")
def main(counts: tuple[int, ...], rounds: int, folder: Path | None, prepare: bool) -> None:
    """Measure every number of users, and write the result file."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place, rows = folder or Path(name), []
        for users in counts:
            made = crowd.kept(place / str(users), users)
            if prepare:
                continue
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
                rows.append(measure(Path(work), made, rounds=rounds))
            click.echo(json.dumps(rows[-1]))
    if rows:
        how = {"under_way": UNDER_WAY, "tokens": TOKENS, "rounds": rounds, "rows": rows}
        packages = ("torch", "starlette", "uvicorn", "jinja2", "sqlalchemy", "selenium")
        click.echo(f"wrote {store('dashboard', {**how, **circumstances(seed=0, packages=packages)})}")


if __name__ == "__main__":
    main()
