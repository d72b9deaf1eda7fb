"""The `soppu` command: a list of names, each loaded only when it is asked for."""

from __future__ import annotations

import importlib
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
        """Run it; a SoppuError becomes `Error: …` and exit code 1."""
        try:
            return super().invoke(ctx)
        except SoppuError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(soppu.__version__, prog_name="soppu")
def main() -> None:
    """One LoRA adapter per user: look at them, compress them together, serve them.

    The whole pipeline runs under Prefect: `prefect deployment run soppu/full-pipeline`.
    """


if __name__ == "__main__":
    sys.exit(main())
