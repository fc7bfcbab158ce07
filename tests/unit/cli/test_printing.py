"""Tables of parameters: names that are one, and names in narrow windows."""

from __future__ import annotations

import io
import re
import sys
from itertools import product

import pytest
from rich.console import Console

from ucp_deepspeed.cli.printing import collapsed, print_labelled, print_lines, print_rows


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"a": 1, "b.0": 1, "b.1": 1, "c": 1}, {"a": "a", "b.{0..1}": "b.0", "c": "c"}),
        ({"b.0.w": 1, "b.1.w": 2, "b.2.w": 1}, {"b.{0,2}.w": "b.0.w", "b.1.w": "b.1.w"}),
        ({"b.10.w": 1, "b.9.w": 1}, {"b.{9..10}.w": "b.9.w"}),
        ({"fc1": 1, "fc2": 1, "b.00": 1, "b.01": 1}, {name: name for name in ("fc1", "fc2", "b.00", "b.01")}),
        ({f"l.{a}.e.{b}": 1 for a, b in product(range(3), range(4))}, {"l.{0..2}.e.{0..3}": "l.0.e.0"}),
        (
            {f"l.{a}.e.{b}": 1 for a in range(3) for b in range(2 if a == 1 else 4)},
            {"l.{0,2}.e.{0..3}": "l.0.e.0", "l.1.e.{0..1}": "l.1.e.0"},
        ),
    ],
)
def test_names_that_differ_in_numbers_alone_are_one(kinds: dict[str, int], expected: dict[str, str]) -> None:
    assert list(collapsed(kinds).items()) == list(expected.items())


ROWS = [
    {"parameter": f"model.decoder.layers.{number}.mlp.weight", "kind": "trainable", "states": "fp32 F32, exp_avg F32"}
    for number in range(2)
]


def printed(width: int, rows: list[dict[str, str]] = ROWS) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_rows(rows, ("states",), "a note", console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_names_lose_their_beginnings_in_narrow_windows() -> None:
    wide = printed(100)
    assert wide[1].split("  ")[0] == ROWS[0]["parameter"] and wide[1].endswith("exp_avg F32")
    narrow = printed(50)
    assert narrow[1].startswith("…layers.0.mlp.weight  trainable  fp32")
    assert all(len(line) <= 50 for line in narrow) and narrow[-1] == "a note"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (27, "layers.{0,2,5}.mlp.1.weight"),
        (21, "…{0,2,5}.mlp.1.weight"),
        (20, "….mlp.1.weight"),
        (16, "….mlp.1.weight"),
    ],
)
def test_names_are_never_cut_in_braces(width: int, expected: str) -> None:
    assert printed(width, [{"parameter": "layers.{0,2,5}.mlp.1.weight"}])[1].rstrip() == expected


def test_on_a_terminal_lines_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("TERM", "xterm")
    print_lines("group 0: 15 parameters, lr=0.1, betas=[0.9, 0.95]", "a" * 40)
    print_labelled([("path", "b" * 40), ("states", "fp32 117.9 KiB, exp_avg 117.9 KiB")])
    told, console = "error: no parameter of runs/a fits", Terminal()
    print_lines(told, file=console)
    assert console.getvalue().splitlines() == ["error: no parameter of runs/a", "    fits"]
    assert re.sub(r"\x1b\[\d+m", "", terminal.getvalue()).splitlines() == [
        "group 0: 15 parameters,",
        "    lr=0.1, betas=[0.9, 0.95]",
        "a" * 40,
        "path",
        f"{'':10}{'b' * 40}",
        "states    fp32 117.9 KiB,",
        f"{'':10}exp_avg 117.9 KiB",
    ]


def test_columns_are_left_out_before_words_break() -> None:
    lines = printed(34)
    assert [line.split() for line in lines[:2]] == [["parameter", "kind"], ["…er.layers.0.mlp.weight", "trainable"]]
    assert lines[-2:] == ["left out in this narrow window: states", "a note"]


def test_columns_are_left_out_before_their_cells_take_many_lines() -> None:
    rows = [{"parameter": "layers.0.mlp.weight", "kind": "trainable", "states": ", ".join(["exp_avg F32"] * 4)}]
    assert printed(60, rows)[1].count("exp_avg") == 2
    lines = printed(40, rows)
    assert lines[1].split() == ["layers.0.mlp.weight", "trainable"] and "states" in lines[2]


def test_shapes_stay_on_one_line() -> None:
    rows = [{"parameter": "layers.0.mlp.weight", "shape": "[64, 1032]", "states": "fp32 F32, exp_avg F32"}]
    assert any("[64, 1032]" in line for line in printed(40, rows)[1:])


def test_brackets_are_no_markup() -> None:
    assert "[bold]" in "".join(printed(100, [{"parameter": "a", "states": "[bold]"}]))
