"""Progress in a log; that on a terminal is in ``test_convert_command``."""

from __future__ import annotations

import pytest

from ucp_deepspeed.cli import progress
from ucp_deepspeed.cli.progress import shown_progress


def lines_of(
    seconds: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool = False
) -> list[str]:
    """Return what work of 100 MiB prints. An even share of it is done at each of these times."""
    clock = iter([0.0, *seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with shown_progress("convert", quiet) as show:
        for number in range(1, len(seconds) + 1):
            show(number * (100 << 20) // len(seconds), 100 << 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of([1.0, 2.0, 3.0, 5.9, 300.0, 301.0], monkeypatch, capsys) == [
        "convert: 33.3 MiB of 100.0 MiB (33%), 16.7 MiB/s, 0:04 left",
        "convert: 83.3 MiB of 100.0 MiB (83%), 284.4 KiB/s, 1:00 left",
    ]


def test_no_line_of_what_is_soon_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of([0.5, 1.9, 2.5], monkeypatch, capsys) == []
    assert lines_of([10.0, 20.0, 30.0], monkeypatch, capsys, quiet=True) == []
