"""Shared by all commands: how they fail, options, and words for sizes."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import click

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import HELP
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.layout import Topology

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

FAILED = 2
"""Exit status when a command couldn't do its work; 1 is an answer: `diff` found differences, `plan` an impossible topology."""


class Command(click.Command):
    """Turns the library's errors, and the system's, into one message. Its help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[str], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, one line each."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        _allow_many_files()
        _print_what_can_be_printed()
        try:
            return super().invoke(ctx)
        except UniversalCheckpointError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _end_without_reader(ctx)
            message = str(error)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except SystemExit as ended:
            if isinstance(ended.__context__, BrokenPipeError):  # rich's answer to it
                _end_without_reader(ctx)
            if (number := _signal_of(ended)) is not None:
                click.echo(f"ended by {number.name}", err=True)
            raise
        except Exception:  # a fault of this package, which must not look like an answer
            message = f"this should not have happened:\n{traceback.format_exc().rstrip()}"
        click.echo(f"error: {message}", err=True)
        ctx.exit(FAILED)


def _end_without_reader(ctx: click.Context) -> NoReturn:
    """End quietly when the reader of the output has gone, as ``head`` does. The status is no command's answer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it empties its buffer
    ctx.exit(128 + signal.SIGPIPE)


def _signal_of(ended: SystemExit) -> signal.Signals | None:
    """The signal that an exit status tells of, as shells have it (`terminated_as_exception`)."""
    with suppress(ValueError, TypeError):
        return signal.Signals(ended.code - 128)  # type: ignore[operator]
    return None


def _print_what_can_be_printed() -> None:
    """Characters that the output's encoding lacks, as in names or tables, become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _allow_many_files() -> None:
    """As many as the system lets this process open: what shells allow is few for checkpoints of many ranks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # a system that has a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


command = partial(click.command, cls=Command, context_settings=HELP)


class _Folder(click.Path):
    """A path; the empty text, which an unset variable of a shell leaves, would be the folder that one stands in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path names no folder", param, ctx)
        return super().convert(value, param, ctx)


CHECKPOINT = _Folder(path_type=Path)

tag_option = click.option("--tag", help="Tag folder to take; by default the one that the file 'latest' names.")

spec_option = click.option(
    "--spec", metavar="NAME|PATH", help="Family or spec file that gives the layouts under tensor parallelism."
)

differing_option = click.option(
    "--on-differing",
    type=click.Choice(["error", "first", "last", "mean", "max"]),
    default="error",
    show_default=True,
    help="Optimizer numbers that differ over SRC's partitions: refuse them, or make one number of them.",
)

vocabulary_option = click.option(
    "--vocabulary-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Rows of the vocabulary without padding; by default as the checkpoint records.",
)


def read_spec(name_or_path: str | None) -> Spec | None:
    """The spec that an option names."""
    return load_spec(name_or_path) if name_or_path is not None else None


def view_of(checkpoint: Checkpoint, spec: str | None, vocabulary_size: int | None = None) -> UniversalView:
    """The universal view of a checkpoint, with the layouts that the options name."""
    return UniversalView.of(checkpoint, read_spec(spec), vocabulary_size)


def degrees(topology: Topology) -> dict[str, int]:
    """A topology, as JSON has it."""
    return {key: getattr(topology, key) for key in ("tp", "pp", "dp", "zero_stage", "ep")}


def numel_of(entry: Mapping[str, Any]) -> int:
    """Elements of a parameter as `inspect` reports it: of the whole, or where no layout is known of the ranks' local tensors."""
    shapes = [entry["shape"]] if entry["shape"] is not None else filter(None, entry["local_shapes"])
    return sum(map(prod, shapes))


def state_bytes(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Size of each state over such parameters."""
    sizes: dict[str, int] = {}
    for entry in entries:
        for state, dtype in entry["states"].items():
            sizes[state] = sizes.get(state, 0) + numel_of(entry) * ITEMSIZE[dtype]
    return sizes


def in_words(numbytes: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if numbytes < 1024:
            return f"{numbytes:.0f} {unit}" if unit == "B" else f"{numbytes:.1f} {unit}"
        numbytes /= 1024
    return f"{numbytes:.1f} TiB"
