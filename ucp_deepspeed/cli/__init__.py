"""The command line: ``ucp``, one module per command, which is imported when the command is called.

Errors that the user can mend are printed as ``error: …`` on stderr, without a traceback; the exit status is then 2.
"""

from __future__ import annotations

import gc
import sys
from difflib import get_close_matches
from importlib import import_module

import click
from click.shell_completion import CompletionItem

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of every command."""

COMMANDS = {
    "inspect": "Show what a checkpoint holds.",
    "convert": "Write a checkpoint in universal form.",
    "diff": "Compare two checkpoints bit for bit.",
    "plan": "Show what a load on another topology would read.",
    "spec": "Write and check spec files: how parameters are sharded.",
}
"""Commands, with one line of help each. A command is ``<name>_command`` in the module of its name."""


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


class SuggestingGroup(click.Group):
    """A group of commands that answers a mistyped name with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name."""
        names = self.list_commands(ctx)
        if not ctx.resilient_parsing and args[0] not in names:
            near = get_close_matches(args[0], names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands: {', '.join(names)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


class Commands(SuggestingGroup):
    """A group that imports a command only when it is called: help and completion of names import no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which they are shown."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands, without their modules."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names and options that begin as typed, without the commands' modules."""
        names = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Commands, context_settings=HELP, epilog="ucp COMMAND --help shows a command's options and examples.")
@click.version_option(package_name="ucp_deepspeed", prog_name="ucp")
def main() -> None:
    """Universal checkpoints for DeepSpeed: a run saved on any topology resumes on any other."""


__all__ = ["COMMANDS", "HELP", "SuggestingGroup", "load_command", "main"]
