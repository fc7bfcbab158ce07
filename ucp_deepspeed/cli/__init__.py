"""The command line: ``ucp``, one module per command, which is imported when the command is called.

Errors that the user can mend are printed as ``error: …`` on stderr, without a traceback; the exit status is then 2.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module

import click

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of every command."""

COMMANDS = ("inspect", "convert", "diff", "plan", "spec")
"""Names of the commands; each is ``<name>_command`` in the module of its name."""


def load_command(name: str) -> click.Command:
    """A command, imported with all that it needs.

    What is imported stays until the end, so that looking through it for garbage is in vain: while it is imported, at each later
    collection, and at the end of the process. That is a quarter of the time that a short command takes.
    """
    module = f"{__name__}.{name}"
    if module not in sys.modules:
        collecting = gc.isenabled()
        gc.disable()
        import_module(module)
        gc.freeze()
        if collecting:
            gc.enable()
    command: click.Command = getattr(sys.modules[module], f"{name}_command")
    return command


class Commands(click.Group):
    """A group of which only the command that is called is imported."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which they are shown."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None


@click.group(cls=Commands, context_settings=HELP)
@click.version_option(package_name="ucp_deepspeed", prog_name="ucp")
def main() -> None:
    """Universal checkpoints for DeepSpeed: a run saved on any topology resumes on any other."""


__all__ = ["COMMANDS", "HELP", "load_command", "main"]
