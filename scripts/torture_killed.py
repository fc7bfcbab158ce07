"""The processes that ``torture_kills.py`` kills: they save, load and convert, up to a moment at which they die.

A kill by *event* comes before the n-th call by which the process opens, flushes, renames, makes or removes something below the
case's folder. So it can be made again, and covers windows that no clock hits. A kill by *time* comes from a timer of the
kernel, wherever the process is by then. A *torn* one cuts the n-th archive short first, as a writer leaves it that is killed
in it.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

PATIENCE_SECONDS = 2.0
"""Bound of each wait of the package's in a case; its users' are minutes."""

WATCHED = ("open", "os.", "shutil.")
"""Beginnings of the interpreter's audit events that count."""


@dataclass(frozen=True)
class Kill:
    """A moment to die.

    Attributes:
        ranks: who dies.
        how: ``event``, ``time`` or ``torn``.
        number: the event or archive, from 1; or seconds from the beginning.
        signum: the signal.
        part: how much of the archive stays.
    """

    ranks: tuple[int, ...]
    how: str
    number: float
    signum: int = signal.SIGKILL
    part: float = 0.5


class _Watch:
    """Counts events below a folder in this process, and dies at one."""

    def __init__(self) -> None:
        self.folder, self.events, self.archives = "", 0, 0
        self.kill: Kill | None = None
        self._begun = False

    def begin(self, folder: Path, kill: Kill | None) -> None:
        if not self._begun:
            self._hook()
        self.folder, self.kill, self.events, self.archives, self._begun = str(folder), kill, 0, 0, True

    def _hook(self) -> None:
        from ucp_deepspeed.engine.saving.snapshot import FileSnapshot

        sys.addaudithook(self._heard)
        fsync, save, write = os.fsync, torch.save, FileSnapshot.write

        def counted_fsync(descriptor: Any) -> None:
            if self.folder:
                self.count()
            fsync(descriptor)

        def counted_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save(content, path, *args, **kwargs)
            self.wrote(path)

        def counted_write(snapshot: Any, partial: Path, *args: Any) -> Any:
            done = write(snapshot, partial, *args)
            self.wrote(partial / snapshot.name)
            return done

        os.fsync, torch.save, FileSnapshot.write = counted_fsync, counted_save, counted_write  # type: ignore[assignment]

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or not event.startswith(WATCHED) or event == "os.kill":
            return
        relative = event in ("os.remove", "os.rmdir") and args[-1] not in (-1, None)
        if relative or any(self.folder in str(each) for each in args[:2]):
            self.count()

    def count(self) -> None:
        self.events += 1
        if self.kill is not None and self.kill.how == "event" and self.events == self.kill.number:
            self.die()

    def wrote(self, path: Any) -> None:
        if self.folder and self.folder in str(path):
            self.archives += 1
            if self.kill is not None and self.kill.how == "torn" and self.archives == self.kill.number:
                self.folder = ""
                os.truncate(path, int(Path(path).stat().st_size * self.kill.part))
                self.die()

    def die(self) -> None:
        assert self.kill is not None
        os.kill(os.getpid(), self.kill.signum)


_watch = _Watch()


class _SignalEvent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signum", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    ]


def _die_in(seconds: float, signum: int) -> None:
    """Have the kernel send this process a signal."""
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _SignalEvent(signum=signum, notify=0)
    whole, rest = divmod(max(seconds, 1e-6), 1)
    times = (ctypes.c_long * 4)(0, 0, int(whole), max(int(rest * 1e9), 1))
    if libc.timer_create(1, ctypes.byref(event), ctypes.byref(timer)) or libc.timer_settime(
        timer, 0, ctypes.byref(times), None
    ):
        raise OSError(ctypes.get_errno(), "no timer")


@contextmanager
def watched(folder: Path, kill: Kill | None) -> Iterator[_Watch]:
    """Count in the block what the process does below a folder, and die at the given moment of it."""
    _watch.begin(folder, kill)
    if kill is not None and kill.how == "time":
        _die_in(kill.number, kill.signum)
    try:
        yield _watch
    finally:
        _watch.folder = ""


def be_impatient() -> None:
    """Bound the package's own waits, so that a case is short."""
    tunables.VISIBLE_SECONDS = tunables.LEAVE_SECONDS = tunables.LOST_SECONDS = PATIENCE_SECONDS
    tunables.JOIN_SECONDS = 4 * PATIENCE_SECONDS
    tunables.BEAT_SECONDS, tunables.LOCK_SECONDS, tunables.NOTE_AGAIN_SECONDS = 0.3, PATIENCE_SECONDS, (0.05, 0.2)


def trained(run: Run, steps: int) -> Any:
    """Build an engine and take steps; streams of random numbers then depend on the step alone."""
    engine = build_engine(run)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    _seed(steps)
    return engine


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    with suppress(ImportError):
        import numpy as np

        np.random.seed(seed)


def values_of(engine: Any) -> dict[str, bytes]:
    """Return what an engine holds of each parameter and state that it trains, whole: by DeepSpeed's own functions. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, bytes] = {}
    for name, parameter in engine.module.named_parameters():
        states = {"fp32": safe_get_full_fp32_param(parameter)} if engine.zero_optimization() else {"fp32": parameter}
        for state in ("exp_avg", "exp_avg_sq"):
            states[state] = (
                safe_get_full_optimizer_state(parameter, state)
                if engine.zero_optimization()
                else engine.optimizer.state[parameter][state]
            )
        for state, tensor in states.items():
            found[f"{name}/{state}"] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def save_bases(run: Run, folder: str, steps: dict[str, int]) -> dict[str, dict[str, bytes]]:
    """On a rank: save tags; return what the run recorded before it saved each."""
    found = {}
    for tag, step in steps.items():
        engine = trained(run, step)
        found[tag] = values_of(engine)
        engine.save_checkpoint(folder, tag=tag)
        _wait()
        engine.destroy()
    return found


def _wait() -> None:
    import ucp_deepspeed

    ucp_deepspeed.wait_for_save()


def act(operation: str, run: Run, steps: int, folder: str, tag: str | None, kill: Kill | None, told: str) -> Any:
    """On a rank: save or load, and die meanwhile if it is this rank's turn. Returns seconds, events and archives.

    What becomes of a rank that lives is written into ``told``; a save's threads have ended by then, or not.
    """
    from deepspeed import comm as dist

    be_impatient()
    rank = dist.get_rank()
    engine = trained(run, steps)
    dist.barrier()
    begun = time.monotonic()
    mine = kill if kill is not None and rank in kill.ranks else None
    error: BaseException | None = None
    with watched(Path(folder), mine) as watch:
        try:
            _operate(operation, engine, folder, tag)
        except Exception as caught:
            error = caught
        late = _late_threads()
    ended = {
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "ours": error is None or isinstance(error, UniversalCheckpointError),
        "seconds": time.monotonic() - begun,
        "late": late,
    }
    Path(told, f"rank{rank}.json").write_text(json.dumps(ended))
    if error is not None:
        raise error
    return ended["seconds"], watch.events, watch.archives


def _operate(operation: str, engine: Any, folder: str, tag: str | None) -> None:
    if operation == "save":
        engine.save_checkpoint(folder, tag=tag)
        _wait()
    else:
        engine.load_checkpoint(folder, tag=tag)


def _late_threads() -> list[str]:
    """Return the threads of saves that don't end."""
    found = [each for each in threading.enumerate() if each.name.startswith("save of")]
    for thread in found:
        thread.join(3 * PATIENCE_SECONDS)
    return [thread.name for thread in found if thread.is_alive()]


_held: dict[str, Any] = {}


def _engine(run: Run, asynchronous: bool) -> Any:
    """Return the engine of this process, which lives from case to case."""
    be_impatient()
    if "engine" not in _held:
        _held["engine"] = build_engine(run)
    engine = _held["engine"]
    config = engine.universal_checkpoint_config
    save = config.save.model_copy(update={"asynchronous": asynchronous})
    engine.universal_checkpoint_config = config.model_copy(update={"save": save})
    return engine


def go_on(run: Run, folder: str, tag: str | None, asynchronous: bool, target: str, next_tag: str) -> tuple[str, int]:
    """On a rank: resume as a user would, and save again. Returns the error of the package, and the step."""
    engine = _engine(run, asynchronous)
    try:
        engine.load_checkpoint(folder, tag=tag)
    except UniversalCheckpointError as error:
        return f"{type(error).__name__}: {error}", 0
    engine.save_checkpoint(target, tag=next_tag)
    _wait()
    return "", engine.global_steps


def resume_meanwhile(run: Run, folder: str, seen: str, stop: str) -> list[str]:
    """On a rank: resume again and again while another job saves; save elsewhere what was loaded. Returns the errors."""
    from deepspeed import comm as dist

    engine, told, number = _engine(run, False), list[str](), 0
    while True:
        stopped = [Path(stop).exists()]
        dist.broadcast_object_list(stopped, 0)
        if stopped[0]:
            return told
        try:
            engine.load_checkpoint(folder)
        except UniversalCheckpointError as error:
            told.append(f"{type(error).__name__}: {error}")
            continue
        engine.save_checkpoint(seen, tag=f"seen{number % 20}")
        number += 1


def convert_here(
    arguments: list[str], places: dict[str, str], kill: Kill | None, watch: str, told: str, log: str
) -> None:
    """In a process of its own session: run ``ucp convert``, or a rank of it, and die meanwhile."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(places)
    be_impatient()
    from ucp_deepspeed.cli import main as ucp
    from ucp_deepspeed.transfer.processes import joined

    begun, code = time.monotonic(), 0
    rank = int(places.get("RANK", 0))
    with watched(Path(watch), kill if kill is not None and rank in kill.ranks else None) as counted:
        try:
            ucp.commands["convert"].main(arguments, prog_name="convert", obj=joined)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    ended = {"code": code, "seconds": time.monotonic() - begun, "events": counted.events}
    Path(told, f"rank{rank}.json").write_text(json.dumps(ended))
    sys.exit(code)
