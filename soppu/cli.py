"""The `soppu` command: a list of names, each loaded only when it is asked for."""

from __future__ import annotations

import errno
import importlib
import io
import sys

import click

import soppu
from soppu.errors import SoppuError

COMMANDS = {
    "users": "soppu.commands.users:users_command",
    "show": "soppu.commands.users:show_command",
    "forget": "soppu.commands.users:forget_command",
    "calibrate": "soppu.commands.calibrate:calibrate_command",
    "compress": "soppu.commands.compress:compress_command",
    "inspect": "soppu.commands.inspect:inspect_command",
    "project": "soppu.commands.bundle:project_command",
    "remove": "soppu.commands.bundle:remove_command",
    "export": "soppu.commands.bundle:export_command",
    "serve": "soppu.commands.serve:serve_command",
    "rollback": "soppu.commands.rollback:rollback_command",
    "report": "soppu.commands.report:report_command",
}


class LazyGroup(click.Group):
    """Commands by name; `soppu --help` does not import torch, and errors of ours end in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order a newcomer would want them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run it; what a person can cause becomes `Error: …` and exit code 1, all else is a fault of ours.

        Click ends Ctrl-C, and a pipe that nobody reads any more, without a traceback.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a path need not be UTF-8, and can be told all the same
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except SoppuError as error:
            raise click.ClickException(str(error)) from error
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
                f"this command needs the Python package {package!r}, which is not installed:"
                " install it with pip, or all that SOPPU can use with pip install 'soppu[serve,pipeline]'"
            ) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(soppu.__version__, prog_name="soppu")
def main() -> None:
    """One LoRA adapter per user: look at them, compress them together, serve them.

    The whole pipeline runs under Prefect: `prefect deployment run soppu/full-pipeline`.
    """


if __name__ == "__main__":
    sys.exit(main())
