"""Output for people and programs: labelled lines, tables whose names stay readable in narrow windows, JSON, words for sizes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from math import prod
from textwrap import fill
from typing import Any, Literal, TextIO, TypeAlias

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import escaped

Row: TypeAlias = Mapping[str, str]
"""Cells by heading."""

PLAIN_WIDTH = 240
"""Columns of a table where the output is no terminal: wide enough that names are not shortened."""

SHORTEST_NAME = 16
"""Columns that a name keeps in a narrow window."""

MOST_LINES = 2
"""Lines that a cell takes, about; columns that would need more are left out."""

_WORD = re.compile(r"\[[^\]]*\]|\S+")
"""A part of a cell that must stay on one line: a word, or a shape."""


def _new_console(file: TextIO | None = None) -> Console:
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else PLAIN_WIDTH, highlight=False, emoji=False)


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text that is safe to show."""
    click.echo(escaped(text), err=err, nl=nl)


def print_json(report: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    click.echo(json.dumps(report, indent=1))


def print_labelled(lines: Iterable[tuple[str, str]], width: int = 10) -> None:
    """Print lines with a label each."""
    console = _new_console()
    for label, value in lines:
        _print_line(console, f"{label:<{width}}{value}", width, len(label))


def print_lines(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, by default to standard output."""
    console = _new_console(file)
    for line in lines:
        _print_line(console, str(line), 4)


def _print_line(console: Console, line: str, indent: int = 0, bold: int = 0) -> None:
    """Print a line whose first characters are bold. On a terminal it breaks only between words."""
    line = escaped(line)
    if console.file.isatty():
        line = fill(line, console.width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    console.print(f"[bold]{line[:bold]}[/bold]{escape(line[bold:])}", soft_wrap=True)


def print_rows(
    rows: Sequence[Row],
    optional: Sequence[str] = (),
    note: str = "",
    justify: Literal["left", "right"] = "left",
    console: Console | None = None,
) -> None:
    """Print a table without lines. In a narrow window names lose their beginnings, since they differ in their ends.

    Args:
        rows: the first heading is the name's; none to print nothing.
        optional: headings to leave out, the first one first, where words would break or cells take many lines.
        note: to stand below.
    """
    if not rows:
        return
    rows = [{heading: in_one_line(cell) for heading, cell in row.items()} for row in rows]
    console = console or _new_console()
    name, *kept = rows[0]
    longest = max(len(row[name]) for row in (*rows, {name: name}))
    cells = {heading: [heading, *(row[heading] for row in rows)] for heading in kept}
    least = {
        heading: max(*(len(word) for cell in held for word in _WORD.findall(cell)), max(map(len, held)) // MOST_LINES)
        for heading, held in cells.items()
    }

    def room() -> int:
        """Columns for names, where all other columns are as narrow as they may be."""
        return console.width - sum(least[heading] + 2 for heading in kept)

    for heading in optional:
        if heading in kept and room() < min(longest, SHORTEST_NAME):
            kept.remove(heading)
    width = min(longest, max(SHORTEST_NAME, min(room(), console.width * 2 // 5)))
    spare = max(0, room() - width)
    widths = []
    for heading in kept:
        wider = min(max(map(len, cells[heading])) - least[heading], spare)
        widths.append(least[heading] + wider)
        spare -= wider
    width = min(longest, width + spare)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, columns in zip((name, *kept), (width, *widths), strict=True):
        table.add_column(heading, overflow="fold", justify=justify, width=columns)
    for row in rows:
        table.add_row(*map(escape, (_shortened(row[name], width), *(row[heading] for heading in kept))))
    console.print(table)
    left_out = [heading for heading in optional if heading in cells and heading not in kept]
    if left_out:
        _print_line(console, f"left out in this narrow window: {', '.join(left_out)}")
    if note:
        _print_line(console, note)


def in_one_line(text: str) -> str:
    """Return a text that is safe to show, without ends of lines."""
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def _shortened(name: str, width: int) -> str:
    """Return a name without its beginning, cut outside of braces."""
    if len(name) <= width:
        return name
    kept = name[len(name) - width + 1 :]
    cut, _, rest = kept.partition("}")
    return f"…{rest if rest and '{' not in cut else kept}"


def numel_of(entry: Mapping[str, Any]) -> int:
    """Count elements of a parameter in a report of `inspect`: of the whole, or without a layout of the ranks' local tensors."""
    shapes = [entry["shape"]] if entry["shape"] is not None else filter(None, entry["local_shapes"])
    return sum(map(prod, shapes))


def state_bytes(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sum the size of each state over such parameters."""
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


def box_in_words(bounds: Sequence[Sequence[int]] | None) -> str:
    """``[0:3, 0:8]``."""
    return "" if bounds is None else f"[{', '.join(f'{low}:{high}' for low, high in bounds)}]"


def collapsed(kinds: Mapping[str, Hashable]) -> dict[str, str]:
    """Names of one kind that differ in their numbers alone, as one: ``layers.{0..31}.mlp.weight`` → the first of them."""
    alike: dict[tuple[tuple[str, ...], Hashable], dict[tuple[int, ...], str]] = {}
    for name, kind in kinds.items():
        parts = _NUMBER.split(name)
        alike.setdefault((tuple(parts[::2]), kind), {})[tuple(map(int, parts[1::2]))] = name
    found: dict[str, str] = {}
    for (texts, _), names in alike.items():
        for sets in _products(names):
            pieces = [
                piece for text, each in zip(texts, (*map(_braces, sets), ""), strict=True) for piece in (text, each)
            ]
            found["".join(pieces)] = names[tuple(each[0] for each in sets)]
    places = {name: place for place, name in enumerate(kinds)}
    return dict(sorted(found.items(), key=lambda entry: places[entry[1]]))


_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,17})(?![^.])")
"""A part of a dotted name that is a number."""


def _products(found: Collection[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Tuples of numbers as a few products of sets."""
    if () in found:
        return [()]
    behind: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in found:
        behind.setdefault(first, []).append(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(behind):
        firsts.setdefault(frozenset(behind[first]), []).append(first)
    return [(tuple(numbers), *rest) for tails, numbers in firsts.items() for rest in _products(tails)]


def _braces(numbers: tuple[int, ...]) -> str:
    """``{0..3,8}``; one number stands for itself."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    told = ",".join("..".join(map(str, run)) for run in runs)
    return told if len(numbers) == 1 else f"{{{told}}}"
