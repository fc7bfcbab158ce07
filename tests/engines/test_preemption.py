"""A signal: all ranks save after the step in which it comes to one of them, and end."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from async_saves import Ranks, held_back, trained
from checkpoints import differences
from deepspeed import comm as dist
from left_alone import Wrapped

import ucp_deepspeed
from ucp_deepspeed import reading
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.engine.saving import background, preemption, save, snapshot
from ucp_deepspeed.testing.ranks import RankError, get_pool
from ucp_deepspeed.testing.runs import Run, batch_of, build_engine, train_step, warnings_of


def block(folder: object, **save: Any) -> dict[str, Any]:
    given = folder if isinstance(folder, dict) else str(folder)
    return {"enabled": True, "save": {"on_signal": given, **save}}


@contextmanager
def own_signals() -> Iterator[None]:
    """Leave a rank's handlers as they were."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.unregister(signal.SIGUSR1)  # the pool's
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR1)


def stopped(run: Run, signalled: dict[int, tuple[int, int]], elastic: bool = False, last: int = 6) -> tuple[Any, ...]:
    """Train with two micro-batches for a step, and signal ranks: rank → the step, and the signal that comes between its two
    micro-batches. Return the exit status, the step and the warnings."""
    with own_signals(), warnings_of() as told, pytest.MonkeyPatch.context() as patch:
        if elastic:
            patch.setenv(preemption.ELASTIC_VARIABLE, "1")
        engine = build_engine(run)
        ucp_deepspeed.add_to_client_state(engine, "steps", lambda: [engine.global_steps])
        try:
            while engine.global_steps < last:
                step, [number, at] = engine.global_steps + 1, signalled.get(dist.get_rank(), (0, 0))
                if run.pp is not None:
                    if step == at:
                        os.kill(os.getpid(), number)
                    train_step(engine, run, step)
                    continue
                share = batch_of(run, step).chunk(dist.get_world_size())[dist.get_rank()]
                for micro in share.chunk(2):
                    engine.backward(engine(micro[:, :-1], micro[:, 1:]))
                    engine.step()
                    if step == at:
                        os.kill(os.getpid(), number)
                        os.kill(os.getpid(), number)  # launchers repeat themselves
        except SystemExit as left:
            return left.code, engine.global_steps, told
        finally:
            engine.destroy()
    return None, engine.global_steps, told


ACCUMULATING = Run("mlp", zero={"stage": 1}, config={"gradient_accumulation_steps": 2})
PIPELINE = Run("gpt", pp=2, zero={"stage": 1}, config={"gradient_accumulation_steps": 2})
STEP = 3


def save_uninterrupted(run: Run, folder: str, steps: int) -> None:
    """Train as `stopped` does, and save."""
    engine = build_engine(run)
    while engine.global_steps < steps:
        step = engine.global_steps + 1
        if run.pp is not None:
            train_step(engine, run, step)
            continue
        for micro in batch_of(run, step).chunk(dist.get_world_size())[dist.get_rank()].chunk(2):
            engine.backward(engine(micro[:, :-1], micro[:, 1:]))
            engine.step()
    engine.save_checkpoint(folder)
    ucp_deepspeed.wait_for_save()
    engine.destroy()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tag that `ACCUMULATING` saves at `STEP` without a signal."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    get_pool(2).run(save_uninterrupted, replace(ACCUMULATING, universal={"enabled": True}), str(folder), STEP)
    return folder / f"global_step{STEP}"


@pytest.mark.parametrize("elastic", [False, True])
def test_the_very_step_is_saved(elastic: bool, uninterrupted: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Under an agent of torch's the rank that got the signal ends with 0, and the other one so that its agent begins anew."""
    run = replace(ACCUMULATING, universal=block(tmp_path))
    first, second = ranks(2).run(stopped, run, {1: (signal.SIGTERM, STEP)}, elastic)
    assert (first[:2], second[:2]) == ((75, STEP), (0 if elastic else 75, STEP))
    assert (tmp_path / "latest").read_text() == uninterrupted.name
    assert differences(tmp_path / uninterrupted.name, uninterrupted) == []
    assert reading.open_checkpoint(tmp_path).client_state["steps"] == [STEP]
    assert f"ago on rank 1: step 3 is saved into {tmp_path}; " in first[2][0] and second[2] == []
    told = "0 on rank 1 and 75 on rank 0" if elastic else "75 on all ranks"
    assert f"the run isn't at its end, and ends for now, with status {told}" in first[2][1]


def test_a_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    run = replace(PIPELINE, universal=block({"folder": str(tmp_path / "a"), "exit_code": 3}))
    assert [each[:2] for each in ranks(2).run(stopped, run, {0: (signal.SIGUSR1, STEP)})] == [(3, STEP)] * 2
    ranks(2).run(save_uninterrupted, replace(PIPELINE, universal={"enabled": True}), str(tmp_path / "b"), STEP)
    assert differences(*(tmp_path / name / f"global_step{STEP}" for name in "ab")) == []


def stopped_in_background(run: Run, folder: str, fails: bool) -> Any:
    """Get a signal while an earlier save is held back, or after it has failed on rank 1 unnoticed."""
    with own_signals(), warnings_of() as told:
        engine = trained(run, 1)
        with held_back() as gate:
            if fails and dist.get_rank() == 1:
                gate.set()
                stands_in = pytest.MonkeyPatch()
                stands_in.setattr(snapshot.FileSnapshot, "write", no_room)
            engine.save_checkpoint(folder)
            os.kill(os.getpid(), signal.SIGTERM)
            if fails and dist.get_rank() == 1:
                vars(engine)[background.OWN].written.wait()
                stands_in.undo()
            threading.Timer(0.3, gate.set).start()
            with pytest.raises(SystemExit):
                train_step(engine, run, 2)
        engine.destroy()
    return told


def no_room(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fails", [False, True])
def test_an_earlier_save_in_the_background(fails: bool, ranks: Ranks, tmp_path: Path) -> None:
    """It is waited for. If it failed, this save is made all the same."""
    run = Run("mlp", zero={"stage": 1}, universal=block(tmp_path, **{"async": True}))
    told = ranks(2).run(stopped_in_background, run, str(tmp_path), fails)
    tags = sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir())
    assert tags == ["global_step1", "global_step2"][fails:]
    assert open_checkpoint(tmp_path).run.global_steps == 2
    assert any("the save before the signal failed: " in line for line in told[0]) == fails


def replace_tag(run: Run, folder: str, fails: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if fails:
            patch.setattr(save, "replace_folder", no_room)
        return stopped(run, {0: (signal.SIGTERM, STEP)})[:2]


def test_a_tag_that_is_there_is_replaced_in_one_step(uninterrupted: Path, ranks: Ranks, tmp_path: Path) -> None:
    """A save that doesn't come so far leaves it whole."""
    other = replace(ACCUMULATING, seed=7, universal={"enabled": True})
    ranks(2).run(save_uninterrupted, other, str(tmp_path), STEP)
    shutil.copytree(tmp_path / uninterrupted.name, tmp_path / "before")
    run = replace(ACCUMULATING, universal=block(tmp_path))
    with pytest.raises(RankError, match="No space left on device"):
        ranks(2).run(replace_tag, run, str(tmp_path), True)
    assert differences(tmp_path / uninterrupted.name, tmp_path / "before") == []
    assert ranks(2).run(replace_tag, run, str(tmp_path), False) == [(75, STEP)] * 2
    assert differences(tmp_path / uninterrupted.name, uninterrupted) == []


def meet_earlier_handlers(run: Run) -> list[str]:
    """Return what became of signals: one that an earlier handler answers, one in a forked process, one whose handler was
    replaced later, and one without an engine."""
    found: list[str] = []

    def leaves(number: int, _: Any) -> None:
        found.append("earlier")
        raise SystemExit(143)

    def later(*_: Any) -> None:
        found.append("later")

    with own_signals():
        signal.signal(signal.SIGTERM, leaves)
        engine = build_engine(run)
        begun, begins = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.write(begins, b"1")
                time.sleep(60)
            except SystemExit as left:
                os._exit(left.code)
            os._exit(1)
        os.read(begun, 1)
        os.kill(child, signal.SIGTERM)
        found.append(f"forked: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
        signal.signal(signal.SIGTERM, later)
        train_step(engine, run, 1)
        os.kill(os.getpid(), signal.SIGTERM)  # the newer handler, and no earlier one, since it calls none
        try:
            train_step(engine, run, 2)
        except SystemExit as left:
            found.append(f"{left.code}")
        signal.signal(signal.SIGTERM, preemption.Noting(leaves))
        preemption._noted = preemption.Noted()
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            train_step(engine, run, 3)
        except SystemExit as left:
            found.append(f"{left.code}")
        engine.destroy()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit as left:
            found.append(f"{left.code} without an engine")
    return found


def test_earlier_handlers(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, universal=block(tmp_path))
    [found] = ranks(1).run(meet_earlier_handlers, run)
    assert found == [
        "forked: 143",
        "later",
        "75",
        "earlier",
        "143",
        "earlier",
        "143 without an engine",
    ]
    assert (tmp_path / "latest").read_text() == "global_step3"


def warnings_of_building(run: Run) -> list[str]:
    """Build an engine where USR1 is faulthandler's, then a second one, not in the main thread."""
    with warnings_of() as told:
        engine = build_engine(run)
        before, preemption._watched = preemption._watched, WeakSet()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        thread = threading.Thread(target=lambda: others.append(build_engine(run)))
        others: list[Any] = []
        thread.start()
        thread.join()
        preemption._watched |= before
        others.append(build_engine(run))
        for each in (engine, *others):
            each.destroy()
    return told


def test_what_cannot_be_heard_is_told(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, universal=block(tmp_path))
    [told] = ranks(1).run(warnings_of_building, run)
    outside = "SIGUSR1 has a handler that isn't Python's, such as faulthandler's"
    in_order = [outside, "the engine isn't built in the main thread", outside, "several engines of this process"]
    assert [any(part in line for line in told) for part in in_order] == [True] * 4, told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"config": {"checkpoint": {"use_node_local_storage": True}}},
            "'on_signal' in 'universal_checkpoint.save' needs a folder that",
        ),
        ({"zero": {"stage": 0}, "optimizer": (Wrapped, {"lr": 1e-3})}, 'without "on_signal"'),
    ],
)
def test_engines_that_cannot_save_so_are_refused(
    changes: dict[str, Any], message: str, ranks: Ranks, tmp_path: Path
) -> None:
    run = replace(Run("mlp", zero={"stage": 1}, universal=block(tmp_path)), **changes)
    with pytest.raises(RankError, match=message):
        ranks(1).run(build_engine, run)
