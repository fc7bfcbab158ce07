"""The command line: ``ucp``, one module per command.

Errors that the user can mend are printed as ``error: …`` on stderr, without a traceback; the exit status is then 2.
"""

from __future__ import annotations

import errno
from typing import Any

import click

from ucp_deepspeed.cli.convert import convert_command
from ucp_deepspeed.cli.diff import diff_command
from ucp_deepspeed.cli.inspect import inspect_command
from ucp_deepspeed.cli.plan import plan_command
from ucp_deepspeed.errors import UniversalCheckpointError

FAILED = 2
"""Exit status when a command couldn't do its work; 1 is an answer: `diff` found differences, `plan` an impossible topology."""


class _Commands(click.Group):
    """A group that turns the library's errors, and the system's, into one message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UniversalCheckpointError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: click ends quietly
                raise
            message = str(error)
        click.echo(f"error: {message}", err=True)
        ctx.exit(FAILED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ucp_deepspeed", prog_name="ucp")
def main() -> None:
    """Universal checkpoints for DeepSpeed: a run saved on any topology resumes on any other."""


main.add_command(inspect_command)
main.add_command(convert_command)
main.add_command(diff_command)
main.add_command(plan_command)

__all__ = ["main"]
