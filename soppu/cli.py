"""The `soppu` command: a list of names, each loaded, and torch with it, only when it is called."""

from __future__ import annotations

import errno
import gc
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.shell_completion import CompletionItem

import soppu
from soppu.commands.listening import listening
from soppu.commands.until_told import until_told
from soppu.errors import MissingExtra, SoppuError

# Name -> the module below soppu.commands that holds it, and the first line of its help.
COMMANDS = {
    "data": ("data", "List who has text in SOURCE, how much, and who would be left out of a run, and why."),
    "users": ("users", "List every user: current adapter, metrics, and where they are served."),
    "show": ("users", "Show every adapter USER has held, oldest first; * marks the current one."),
    "bases": (
        "bases",
        "List the bases of a registry, oldest first; * marks those in force, one for each base model.",
    ),
    "forget": ("users", "Delete USER's history, metrics and adapters."),
    "calibrate": (
        "calibrate",
        "Measure what the layers of MODEL get as input, so that compression can spare what they use.",
    ),
    "compress": ("compress", "Compress the PEFT adapters in DIR... into one bundle."),
    "inspect": ("inspect", "Check the file BUNDLE, every page of it, and print what it holds."),
    "project": ("bundle", "Add new users to BUNDLE without touching anybody else's numbers, and write NEW."),
    "remove": ("bundle", "Take USER... out of BUNDLE: their numbers are not in NEW."),
    "export": (
        "bundle",
        "Write the users of BUNDLE as PEFT folders that LoRAX, PEFT and others load: DIR/USER.",
    ),
    "router": (
        "router",
        "Fit, and show, what decides whether the base model or the user's adapter answers a request.",
    ),
    "join": ("join", "Train USER inside the basis of a fleet that is served, and serve them."),
    "admit": ("join", "Take users who joined at a server itself into the registry."),
    "serve": ("serve", "Serve a base model with every user's adapter, over LoRAX's HTTP API."),
    "gateway": (
        "gateway",
        "Serve users' own models, and nobody else's, to whoever shows a key or a signed token.",
    ),
    "keys": ("keys", "Make, list and revoke the keys that a gateway takes."),
    "resolve": ("resolve", "Say where USER is served now, and which adapter_id a request has to name there."),
    "verify-target": (
        "verify_target",
        "Try every point that the server at URL can get wrong with users' adapters; pass or fail for each.",
    ),
    "federation": ("federation", "Say which node is whose, where a SuperLink has SuperNodes of its own."),
    "rollback": ("rollback", "Make the bundle before the present one live again, and record that."),
    "train": (
        "train",
        "Train one LoRA on the text of all users of RUN_DIR: the run's upper bound.",
    ),
    "evaluate": (
        "evaluate",
        "Compare ways to serve the users of RUN_DIR: held-out loss, text, latency, memory, bytes.",
    ),
    "run": (
        "run",
        "Start the pipeline on the Prefect server that is up, and show how far it is until it ends.",
    ),
    "watch": ("watch", "Show how far the run in RUN_DIR is, until it ends."),
    "export-tasks": (
        "export_tasks",
        "Write the held-out text of RUN_DIR as tasks of EleutherAI's lm-eval, into DIR.",
    ),
    "dashboard": (
        "dashboard",
        "Show users, versions, what is published where, traffic and runs, live in a browser.",
    ),
    "report": ("report", "Render report.html in RUN_DIR again from report.json, and print the summary."),
}
UNTIL_TOLD = ("serve", "gateway")  # those that run until they are told to stop
LISTENING = ("run", "watch")  # those that show what goes on without them
# Command -> the extra that it needs, and the packages in it.
_SERVING = ("serve", ("starlette", "uvicorn", "llguidance", "prometheus_client"))
EXTRAS = {
    "serve": _SERVING,
    "join": _SERVING,  # it publishes
    "admit": _SERVING,
    "evaluate": ("serve", ("llguidance",)),  # the server's engine
    "dashboard": ("serve", ("starlette", "uvicorn", "prometheus_client")),
    "gateway": ("gateway", ("starlette", "uvicorn", "prometheus_client", "httpx", "limits", "jwt")),
}


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Nothing that a module makes as it is loaded is garbage: not looking for any saves a fifth of it."""
    if name in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class LazyGroup(click.Group):
    """Commands by name; `soppu --help` and completion load none, and errors of ours end in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order a newcomer would want them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; what it needs and is not there is told before the seconds that takes."""
        if cmd_name not in COMMANDS:
            return None
        extra, packages = EXTRAS.get(cmd_name, ("", ()))
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(f"soppu {cmd_name}", package=package, extra=extra)
        with _loading(name := f"soppu.commands.{COMMANDS[cmd_name][0]}"):
            module = importlib.import_module(name)
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Choose one command; signals are heard from before its imports, which take seconds."""
        if args[:1] and args[0] in UNTIL_TOLD and not ctx.resilient_parsing:
            ctx.with_resource(until_told())
        if args[:1] and args[0] in LISTENING and not ctx.resilient_parsing:
            ctx.obj = ctx.with_resource(listening())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names out of the table above, and options."""
        names = [
            CompletionItem(name, help=text)
            for name, (_, text) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> object:
        """Run it; what a person can cause becomes `Error: …` and an exit code, all else is a fault of ours.

        Click ends Ctrl-C, and a pipe that nobody reads any more, without a traceback.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a path need not be UTF-8, and can be told all the same
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except SoppuError as error:
            refusal = click.ClickException(str(error))
            refusal.exit_code = error.exit_code  # type: ignore[misc]  # click means it as a default
            raise refusal from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{place}{error.strerror or error}") from error
        except ModuleNotFoundError as error:
            if not error.name or error.name.partition(".")[0] == "soppu":
                raise
            package = error.name.partition(".")[0]
            raise click.ClickException(
                f"this command needs the Python package {package!r}: install it with pip"
            ) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(soppu.__version__, prog_name="soppu")
def main() -> None:
    """One LoRA adapter per user: look at them, compress them together, serve them.

    The whole pipeline runs under Prefect: `soppu run`.
    """


if __name__ == "__main__":
    sys.exit(main())
