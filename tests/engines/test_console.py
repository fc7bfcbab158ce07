"""Lines on stderr, by rank, when nobody has configured Python's logging."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from checkpoints import STEP

import ucp_deepspeed
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train

Ranks = Callable[[int], RankPool]

RUN = Run("mlp", zero={"stage": 1})
LATER = Run("mlp", zero={"stage": 1}, universal={"enabled": True, "save": {"async": True}})
OTHER = Run("mlp", zero={"stage": 3})


@contextmanager
def lines(*handlers: logging.Handler) -> Iterator[list[str]]:
    """Collect lines on stderr, under a level that no script has set. Otherwise ranks of tests are quiet."""
    logger, written, found = logging.getLogger("ucp_deepspeed"), io.StringIO(), list[str]()
    before = logger.level
    logger.setLevel(logging.NOTSET)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        with redirect_stderr(written):
            yield found
    finally:
        found += written.getvalue().splitlines()
        logger.setLevel(before)
        for handler in handlers:
            logger.removeHandler(handler)


def lines_of(run: Run, steps: int, *, handled: bool = False, **arguments: Any) -> list[str]:
    """On a rank: what a run writes to stderr."""
    with lines(*([logging.NullHandler()] if handled else [])) as found:
        train(run, steps, **arguments)
        ucp_deepspeed.wait_for_save()
    return [line for line in found if "ucp_deepspeed" in line]


def lines_of_deepspeed(run: Run, folder: str) -> list[str]:
    """Return, on a rank, the lines of DeepSpeed's logger while nothing is found to load."""
    from deepspeed.utils import logger

    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        assert train(run, 0, load=folder).load_path is None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    return [line for line in found if "latest" in line]


def test_one_line_for_each_load_and_each_save_in_the_background(ranks: Ranks, tmp_path: Path) -> None:
    """On the first rank; none for saves that the script waits for. The first in the background also tells what memory it
    takes."""
    saved = ranks(2).run(lines_of, LATER, STEP, save=str(tmp_path))
    assert saved[1] == []
    memory, done = saved[0]
    assert "snapshots take up to" in memory
    assert f"[INFO] [ucp_deepspeed] saved {tmp_path}/global_step{STEP} (" in done
    for run, told in ((OTHER, "rank 0 read"), (RUN, "by DeepSpeed itself")):
        found = ranks(2).run(lines_of, run, STEP, load=str(tmp_path), save=str(tmp_path / "again"))
        assert found[1] == []
        assert len(found[0]) == 1, found[0]
        assert f"[INFO] [ucp_deepspeed] loaded {tmp_path}/global_step{STEP} (step {STEP}" in found[0][0]
        assert told in found[0][0]


def test_a_script_that_has_handlers_gets_no_second_line(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1).run(lines_of, LATER, STEP, save=str(tmp_path), handled=True) == [[]]


def test_a_folder_without_a_checkpoint_is_told_once(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2).run(lines_of_deepspeed, RUN, str(tmp_path))
    assert [line.partition(" at ")[0] for line in first] == ["Unable to find latest file"]
    assert second == []
