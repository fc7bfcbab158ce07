"""Actions of a framework that follow a save in the background, on any rank, without meeting the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from async_saves import RUNS, Ranks, held_back, trained

import ucp_deepspeed
from ucp_deepspeed.engine.saving import snapshot
from ucp_deepspeed.engine.saving.background import finish_here, is_pending, pending_below, when_on_disk
from ucp_deepspeed.errors import SaveError


def act_when_on_disk(run: Any, folder: str) -> dict[str, Any]:
    """Return what this rank saw: before the files are written, and from the action."""
    root, seen = Path(folder), {}
    engine = trained(run, 1)
    with held_back() as gate:
        engine.save_checkpoint(folder, tag="new")
        when_on_disk(root, lambda: seen.update(there=(root / "new").is_dir(), latest=(root / "latest").is_file()))
        when_on_disk(root / "other", lambda: seen.update(other=True))
        seen["before"] = (dict(seen), is_pending(root), is_pending(root / "other"))
        dist.barrier()
        gate.set()
        finish_here(root)
    [writing] = pending_below(root) or [None]
    if writing is not None:
        writing.join()
    seen["late"] = []
    when_on_disk(root, lambda: seen["late"].append((root / "new").is_dir()))
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return seen


def test_an_action_follows_the_save_on_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    _, run = RUNS["zero-2"]
    for rank, seen in enumerate(ranks(2).run(act_when_on_disk, run, str(tmp_path))):
        assert seen["before"] == ({"other": True}, True, False)
        assert (seen["there"], seen["late"]) == (True, [True])
        assert seen["latest"] or rank == 1  # rank 0 moves it right after the folder


def act_after_failure(run: Any, folder: str, unlucky: int, over: bool) -> dict[str, Any]:
    """One rank can't write its files, of a new tag or of one that is there."""
    root, seen, write = Path(folder), {"acted": False}, snapshot.FileSnapshot.write

    def failing(self: snapshot.FileSnapshot, *rest: Any) -> Any:
        if dist.get_rank() == unlucky:
            raise OSError(28, "No space left on device")
        return write(self, *rest)

    engine = trained(run, 1)
    if over:
        engine.save_checkpoint(folder, tag="new")
        ucp_deepspeed.wait_for_save()
    snapshot.FileSnapshot.write = failing  # type: ignore[method-assign]
    try:
        engine.save_checkpoint(folder, tag="new")
        when_on_disk(root, lambda: seen.update(acted=True))
        finish_here(root)
        when_on_disk(root, lambda: seen.update(acted=True))
        try:
            ucp_deepspeed.wait_for_save()
        except SaveError as error:
            seen["error"] = str(error)
    finally:
        snapshot.FileSnapshot.write = write  # type: ignore[method-assign]
    engine.destroy()
    return seen | {"there": (root / "new").is_dir()}


@pytest.mark.parametrize("over", [False, True], ids=["new", "saved over"])
@pytest.mark.parametrize("unlucky", [0, 1])
def test_no_action_follows_a_save_that_failed_on_some_rank(
    unlucky: int, over: bool, ranks: Ranks, tmp_path: Path
) -> None:
    for rank, seen in enumerate(ranks(2).run(act_after_failure, RUNS["zero-2"][1], str(tmp_path), unlucky, over)):
        assert (seen["acted"], seen["there"], rank) == (False, over, rank)
        assert "No space left" in seen["error"]


def act_with_error(run: Any, folder: str) -> bool:
    """The action raises; the save, and the next one, don't."""
    root = Path(folder)
    engine = trained(run, 1)

    def fail() -> None:
        raise ValueError("unlucky")

    for tag in ("one", "two"):
        engine.save_checkpoint(folder, tag=tag)
        when_on_disk(root, fail)
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return (root / "one").is_dir() and (root / "two").is_dir()


def test_an_error_of_an_action_fails_no_save(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(act_with_error, RUNS["zero-2"][1], str(tmp_path)) == [True, True]
