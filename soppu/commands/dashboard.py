"""`soppu dashboard`: a live page of users, versions, what is published where, traffic, and runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import uvicorn

from soppu.commands.options import HOST, registry_options
from soppu.dashboard.app import application
from soppu.dashboard.runs import Runs
from soppu.dashboard.views import House
from soppu.dashboard.watcher import Watcher
from soppu.registry import Registry
from soppu.serve.port import claim_port

_TURN_S = 0.0005  # with Python's own 5 ms fifty rows took up to 305 ms beside such a thread, with this 17 ms


def _targets(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, _, url = value.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise click.BadParameter(f"{value!r}, allowed: NAME=http://... or NAME=https://...")
        if name in found:
            raise click.BadParameter(f"{name!r} is named twice")
        found[name] = url
    return found


def _published(registry: Registry) -> dict[str, str]:
    """The targets that were published to; told apart by their address where they have one name."""
    places = [one for one in registry.in_force() if one.url]
    names = [one.target for one in places]
    return {
        one.target if names.count(one.target) == 1 else f"{one.target} {one.url}": one.url for one in places
    }


@contextmanager
def _turns() -> Iterator[None]:
    """A thread that reads what a server tells lets the pages' on, ten times sooner than Python would.

    SQLite gives the interpreter up at every row, so a page of fifty users has to get it back fifty times.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@click.command("dashboard")
@registry_options("The registry that is looked at; nothing in it is changed.")
@click.option(
    "--runs",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of run folders.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME=URL",
    callback=_targets,
    help="A server whose /metrics are shown; repeatable. Default: those that were published to.",
)
@HOST
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8321,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option(
    "--known-as",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name that browsers ask for beside this machine's own; others are refused. Repeatable.",
)
def dashboard_command(
    root: str,
    catalogue: str,
    *,
    folder: Path,
    targets: dict[str, str],
    host: str,
    port: int,
    hosts: tuple[str, ...],
) -> None:
    """Show users, versions, what is published where, traffic and runs, live in a browser.

    It reads the registry, run folders and servers' /metrics, and changes nothing. There is no login: who can
    reach it sees users' names and losses, so it listens on this machine alone unless --host says otherwise.
    """
    registry = Registry.open(root, catalogue=catalogue, create=False)
    known = targets or _published(registry)
    runs = Runs(folder)
    watcher = Watcher(runs, known)
    house = House(registry, runs, watcher, name=catalogue or root)
    try:
        with claim_port(host, port) as listener, suppress(KeyboardInterrupt):
            app = application(house, hosts=[host, *hosts])
            watcher.start()
            click.echo(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/")
            config = uvicorn.Config(app, log_level="warning", server_header=False)
            with _turns():
                uvicorn.Server(config).run(sockets=[listener])
    finally:
        watcher.stop()
        registry.close()
