"""The command line: ``ucp``, one module per command.

Errors that the user can mend are printed as ``error: …`` on stderr, without a traceback; the exit status is then 2.
"""

from __future__ import annotations

import click

from ucp_deepspeed.cli.convert import convert_command
from ucp_deepspeed.cli.diff import diff_command
from ucp_deepspeed.cli.inspect import inspect_command
from ucp_deepspeed.cli.options import HELP
from ucp_deepspeed.cli.plan import plan_command
from ucp_deepspeed.cli.spec import spec_command


@click.group(context_settings=HELP)
@click.version_option(package_name="ucp_deepspeed", prog_name="ucp")
def main() -> None:
    """Universal checkpoints for DeepSpeed: a run saved on any topology resumes on any other."""


main.add_command(inspect_command)
main.add_command(convert_command)
main.add_command(diff_command)
main.add_command(plan_command)
main.add_command(spec_command)

__all__ = ["main"]
