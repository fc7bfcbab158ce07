"""Commands as click knows them: their options, and the way in which they run and fail. Imports no torch."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from ucp_deepspeed.errors import ConfigError, UniversalCheckpointError, escaped, is_of_system
from ucp_deepspeed.remote import is_url, located

HELP = {"help_option_names": ["-h", "--help"]}
"""Settings of every command."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

NO, FAILED = 1, 2
"""Exit statuses. 1 is an answer: `diff` found differences, `plan` an impossible topology. 2: a command couldn't do its work."""


class Command(click.Command):
    """A command that imports its work when it is called. It turns errors into one message. Its help ends with examples.

    Args:
        work: ``module.function`` in this package. The function takes the parameters and may return an exit status.
    """

    def __init__(self, name: str, work: str, examples: Sequence[str], **settings: Any) -> None:
        context = HELP | settings.pop("context_settings", {})
        super().__init__(name, callback=partial(_do, work), context_settings=context, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one line each."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> None:
        """Run the command."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # a system that has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # shells allow few for checkpoints of many ranks
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="replace")  # characters that its encoding lacks become question marks
        logging.getLogger("ucp_deepspeed").addFilter(_escaped)
        try:
            ctx.exit(super().invoke(ctx) or 0)
        except UniversalCheckpointError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _end_without_reader(ctx)
            places = [value for value in ctx.params.values() if isinstance(value, Path)]
            told = "" if error.filename is not None else f" (with {', '.join(map(str, places))})"
            message = escaped(f"{error}{told}")
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except SystemExit as ended:
            if isinstance(ended.__context__, BrokenPipeError):  # rich's answer to it
                _end_without_reader(ctx)
            with suppress(ValueError, TypeError):  # a status that tells of a signal (`terminated_as_exception`)
                click.echo(f"ended by {signal.Signals(ended.code - 128).name}", err=True)  # type: ignore[operator]
            raise
        except Exception as error:
            if is_of_system(error):
                message = f"there is too little memory: {type(error).__name__}: {escaped(str(error))}"
            else:  # a fault of this package, which must not look like an answer
                message = f"this should not have happened:\n{traceback.format_exc().rstrip()}"
        import_module("ucp_deepspeed.cli.printing").print_lines(*f"error: {message}".split("\n"), file=sys.stderr)
        ctx.exit(FAILED)


def _escaped(record: logging.LogRecord) -> bool:
    """Make the text of a record safe to show."""
    record.msg, record.args = escaped(record.getMessage()), ()
    return True


def _do(work: str, **parameters: Any) -> int | None:
    """Import a function and call it.

    Imported objects stay until the end. To look through them for garbage would take a quarter of a short command's time.
    """
    module, _, function = work.partition(".")
    collecting = gc.isenabled()
    gc.disable()
    imported = import_module(f"ucp_deepspeed.cli.{module}")
    gc.freeze()
    if collecting:
        gc.enable()
    status: int | None = getattr(imported, function)(**parameters)
    return status


def _end_without_reader(ctx: click.Context) -> NoReturn:
    """End quietly when the reader of the output has gone, as ``head`` does. The status is no command's answer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it empties its buffer
    ctx.exit(128 + signal.SIGPIPE)


class Commands(click.Group):
    """A group of commands that answers a mistyped name with the nearest one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order in which they were given."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name."""
        if not ctx.resilient_parsing and args[0] not in self.commands:
            near = get_close_matches(args[0], self.commands, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands: {', '.join(self.commands)}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


class _Folder(click.Path):
    """A path. The empty text, which an unset variable of a shell leaves, would be the folder that one stands in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path names no folder", param, ctx)
        if isinstance(value, str):
            try:
                value = located(value)
            except ConfigError as error:
                self.fail(str(error), param, ctx)
            if is_url(value):
                return value
        return super().convert(value, param, ctx)


class _Picture(click.Path):
    """A file to draw in. What hinders that is told before any work is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path: Path = super().convert(value, param, ctx)  # type: ignore[assignment]
        if path.suffix.lower() not in ENDINGS:
            self.fail(f"{path} needs a name and an ending of {', '.join(ENDINGS)}: picture{ENDINGS[0]}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent}", param, ctx)
        try:
            import_module("matplotlib.figure")
        except ImportError as error:
            self.fail(f"it needs matplotlib ({error}): pip install 'ucp-deepspeed[plots]'", param, ctx)
        return path


class _Counts(click.ParamType):
    """Numbers from 1 on, with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r} isn't a list of numbers from 1 on, such as 3,4", param, ctx)
        return tuple(map(int, parts))


def option(*names: str, **settings: Any) -> click.Option:
    """An option; settings as of `click.option`."""
    return click.Option(names, **settings)


def checkpoint(name: str, **settings: Any) -> click.Option:
    """An option that is the path of a checkpoint."""
    return option(name, type=CHECKPOINT, metavar="CKPT", **settings)


def folder(name: str, **settings: Any) -> click.Argument:
    """An argument that is the path of a checkpoint."""
    return click.Argument([name], type=CHECKPOINT, **settings)


CHECKPOINT = _Folder(path_type=Path)
FAMILY = {"metavar": "NAME|PATH"}
COUNT = click.IntRange(min=1)

TAG = option("--tag", help="Tag folder to take; by default the one that the file 'latest' names.")
SPEC = option("--spec", help="Family or spec file that gives the layouts under tensor parallelism.", **FAMILY)
VOCABULARY = option(
    "--vocabulary-size",
    type=COUNT,
    metavar="N",
    help="Rows of the vocabulary without padding; by default as the checkpoint records.",
)
READING = (TAG, SPEC, VOCABULARY)
LAYERS = option(
    "--layers",
    type=_Counts(),
    metavar="N,N,…",
    help="Layers of each stage of a pipeline, as DeepSpeed prints them; by default as in SRC, if that has --pp stages.",
)
ENGINE_CONFIG = option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="DeepSpeed config (JSON) of the engine of --to deepspeed; by default SRC's, with ZeRO stage --zero.",
)
JSON = option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
ENDINGS = ".svg", ".png", ".pdf"
PLOT = option(
    "--plot",
    type=_Picture(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"Also draw a picture; the ending says how: {', '.join(ENDINGS)}.",
)


def topology(**settings: Any) -> list[click.Option]:
    """Options that are the sizes of a target. Args: settings: of those without which there is no target."""
    return [
        option("--tp", type=COUNT, default=1, show_default=True, help="Tensor-parallel size."),
        option("--pp", type=COUNT, default=1, show_default=True, help="Pipeline-parallel size."),
        option("--dp", type=COUNT, help="Data-parallel size.", **settings),
        option("--zero", type=click.IntRange(0, 3), help="ZeRO stage.", **settings),
        option("--ep", type=COUNT, default=1, show_default=True, help="Expert-parallel size."),
    ]


def engine() -> list[click.Option]:
    """Options that describe an engine that is to load DeepSpeed's own files."""
    return [*topology(), LAYERS, ENGINE_CONFIG]


def choice(name: str, choices: str, **settings: Any) -> click.Option:
    """An option with a few values, the first of which is the default."""
    values = choices.split()
    return option(name, type=click.Choice(values), default=values[0], **settings)
