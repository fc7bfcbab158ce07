"""Output for people: a console, labelled lines, and tables whose names stay readable in narrow windows."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 240
"""Columns of a table where the output is no terminal: wide enough that names are not shortened."""

SHORTEST_NAME = 16
"""Columns that a name keeps in a narrow window."""


def new_console() -> Console:
    """A console on standard output."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_lines(console: Console, lines: Iterable[tuple[str, str]], width: int = 10) -> None:
    """Print labelled lines. A terminal wraps them, and copies of them are whole."""
    for label, value in lines:
        console.print(f"[bold]{label:<{width}}[/bold]{escape(value)}", soft_wrap=True)


def print_plain(console: Console, line: object) -> None:
    """Print one line as it is."""
    console.print(escape(str(line)), soft_wrap=True)


def new_table(*columns: str, **settings: Any) -> Table:
    """A table without lines, with these headings."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, **({"overflow": "fold"} | settings))
    return table


def print_by_name(
    console: Console, rows: Sequence[Mapping[str, str]], optional: Sequence[str] = (), note: str = ""
) -> None:
    """Print a table of parameters. In a narrow window names lose their beginnings, since they differ in their ends.

    Args:
        rows: by heading; the first is the name.
        optional: headings to leave out, the first one first, where words would break.
        note: to stand below.
    """
    name, *kept = rows[0]
    longest = max(len(row[name]) for row in rows)
    cells = {heading: [heading, *(row[heading] for row in rows)] for heading in kept}
    least = {heading: max(len(word) for cell in held for word in cell.split()) for heading, held in cells.items()}

    def room() -> int:
        """Columns for names, where no other column is wider than its longest word."""
        return console.width - sum(least[heading] + 2 for heading in kept)

    for heading in optional:
        if heading in kept and room() < min(longest, SHORTEST_NAME):
            kept.remove(heading)
    width = min(longest, max(SHORTEST_NAME, min(room(), console.width * 2 // 5)))
    spare = max(0, room() - width)
    table = new_table(name, *kept)
    for heading, column in zip(kept, table.columns[1:], strict=True):
        wider = min(max(map(len, cells[heading])) - least[heading], spare)
        column.width, spare = least[heading] + wider, spare - wider
    width = table.columns[0].width = min(longest, width + spare)
    for row in rows:
        title = row[name]
        title = title if len(title) <= width else f"…{title[len(title) - width + 1 :]}"
        table.add_row(*map(escape, (title, *(row[heading] for heading in kept))))
    console.print(table)
    left_out = [heading for heading in optional if heading in cells and heading not in kept]
    if left_out:
        print_plain(console, f"left out in this narrow window: {', '.join(left_out)}")
    if note:
        print_plain(console, note)


def box_in_words(bounds: Sequence[Sequence[int]] | None) -> str:
    """``[0:3, 0:8]``."""
    return "" if bounds is None else f"[{', '.join(f'{low}:{high}' for low, high in bounds)}]"


def collapsed(kinds: Mapping[str, Hashable]) -> dict[str, str]:
    """Names of one kind that differ in their numbers alone, as one: ``layers.{0..31}.mlp.weight`` → the first of them.

    Args:
        kinds: by name, what must be the same of names that become one.
    """
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


_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]*)(?![^.])")
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
