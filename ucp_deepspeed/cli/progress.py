"""Progress of a command: a bar on a terminal, and a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from ucp_deepspeed import tunables
from ucp_deepspeed.cli.printing import in_words

Progress = Callable[[int, int], None]
"""Called with the number of bytes, or of other things, that are done, and with that of all."""


@contextmanager
def shown_progress(what: str, quiet: bool = False, in_bytes: bool = True) -> Iterator[Progress]:
    """Show how far some work is, on standard error."""
    console = Console(file=sys.stderr)
    if quiet:
        yield lambda done, total: None
    elif not console.is_terminal:  # in a log a bar would be one line of no use
        yield _lines(what, in_words if in_bytes else "{:,.0f}".format)
    else:
        from rich import progress as bars

        counted = (bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn())
        columns = counted if in_bytes else (bars.MofNCompleteColumn(), what)
        # It makes place for the summary, or for an error.
        with bars.Progress(
            bars.BarColumn(), *columns, bars.TimeRemainingColumn(), console=console, transient=True
        ) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(what: str, words: Callable[[float], str]) -> Progress:
    """Return progress for a log."""
    start, pause = time.monotonic(), tunables.TOLD_SECONDS
    following = start + pause

    def tell(done: int, total: int) -> None:
        nonlocal pause, following
        now = time.monotonic()
        if now < following or not 0 < done < total:
            return
        pause = min(2 * pause, tunables.MOST_TOLD_SECONDS)
        following = now + pause
        rate = done / (now - start)
        left = round((total - done) / rate)
        shown = f"{words(done)} of {words(total)} ({done / total:.0%}), {words(rate)}/s"
        click.echo(f"{what}: {shown}, {left // 60}:{left % 60:02} left", err=True)

    return tell
