"""Preemption: a run that gets a signal saves after the step that it is in, on all ranks, and ends.

The handler only notes the signal. At the end of each optimizer step (``engine.step`` at a boundary of the accumulation, or
``train_batch`` of a pipeline) all ranks ask one another whether any of them has noted one. That is one all-reduce of four bytes
over gloo, between the hosts: no accelerator is waited for, and what is queued there goes on. But the hosts wait for the slowest
one of them at each step, and the message takes a few times the network's latency: its rounds are the logarithm of the ranks.

The save takes its usual way. A tag that was there before is replaced in one step, as saves in the background do. So a run that is
killed while it saves has the checkpoint that it had before.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakSet

from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.config import OnSignal
from ucp_deepspeed.engine.agreement import any_failed, gathered
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.replaced import replaced
from ucp_deepspeed.engine.saving.background import wait_for_save
from ucp_deepspeed.engine.saving.save import IN_ONE_STEP, seconds_of_last_save
from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.waiting import end_quickly

logger = logging.getLogger("ucp_deepspeed")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

ELASTIC_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Variable that torch's elastic agent sets for its workers."""

LEFT_TO = "_universal_checkpoint_stops_by"
"""Attribute of an engine whose framework saves and ends the run itself; see `leave_to`."""


@dataclass
class Noted:
    """The signals of this process.

    Attributes:
        number: the first one's; None if there was none.
        since: `time.monotonic` when it came.
        raised: the first exception of an earlier handler: it is put off until the checkpoint is on disk.
    """

    number: int | None = None
    since: float = 0.0
    raised: BaseException | None = None


_noted = Noted()

_watched: WeakSet[Any] = WeakSet()
"""Engines that save on a signal."""


class Noting:
    """A handler of a signal, and the one that was there before."""

    def __init__(self, earlier: Any) -> None:
        self._earlier, self._process = earlier, os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, and call the earlier handler. Without an engine that saves, and in processes that this one has forked,
        all is as if this handler weren't there."""
        if os.getpid() != self._process or not _watched:
            signal.signal(number, signal.SIG_DFL if self._earlier is None else self._earlier)
            os.kill(os.getpid(), number)
            return
        if _noted.number is None:
            _noted.number, _noted.since = number, time.monotonic()
            _say_at_once(number)
        if callable(self._earlier):
            try:
                self._earlier(number, frame)
            except BaseException as error:
                _noted.raised = _noted.raised or error


def _say_at_once(number: int) -> None:
    """Write a line to stderr. Logging takes locks, which the code that was interrupted may hold."""
    config = _config(next(iter(_watched)))
    seconds = max((taken for engine in _watched if (taken := seconds_of_last_save(engine)) is not None), default=None)
    last = "" if seconds is None else f", and the last save took {seconds:.1f} s"
    text = (
        f"[WARNING] [ucp_deepspeed] rank {os.environ.get('RANK', '0')}: {_name(number)}: the run saves when this step is done, "
        f"and ends; {config.grace_seconds:g} s are left{last}\n"
    )
    with suppress(OSError):
        os.write(2, text.encode())


def watch(engine: Engine) -> None:
    """Save and end at the end of the step in which a signal comes, if the block says so; called when the engine is built."""
    global _noted
    if engine.universal_checkpoint_config.save.on_signal is None:
        return
    if _watched and dist.get_rank() == 0:
        logger.warning(
            "several engines of this process have 'on_signal': at a signal the first one that ends a step is saved, and it "
            "alone; let one engine have it, and add what belongs to the others to its client state"
        )
    if not _watched:  # what an earlier engine has answered is over
        _noted = Noted()
    name = "train_batch" if isinstance(engine, PipelineEngine) else "step"
    step, destroy = getattr(engine, name), getattr(engine, "destroy")  # noqa: B009, a method that isn't in `Engine`

    @wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        before = engine.global_steps
        _handle()  # somebody may have replaced the handlers
        result = step(*args, **kwargs)
        if engine.global_steps != before and engine in _watched and any_failed(_noted.number is not None):
            _stop(engine)
        return result

    @wraps(destroy)
    def destroyed(*args: Any, **kwargs: Any) -> Any:
        _watched.discard(engine)
        return destroy(*args, **kwargs)

    vars(engine).update({name: stepped, "destroy": destroyed})
    _watched.add(engine)
    if not (_handle() or all(isinstance(signal.getsignal(number), Noting) for number in SIGNALS)):
        logger.warning(
            "rank %s: the engine isn't built in the main thread, and only that one can set handlers of signals: the run saves if "
            "another rank gets the signal; build the engine in the main thread",
            dist.get_rank(),
        )
    if (outside := [_name(number) for number in SIGNALS if _is_outside(number)]) and dist.get_rank() == 0:
        logger.warning(
            "%s has a handler that isn't Python's, such as faulthandler's, and is left to it: the run doesn't save on it; "
            "register that handler for another signal",
            " and ".join(outside),
        )


def _handle() -> bool:
    """Set the handlers before the earlier ones, unless they are there. Return whether that can be done here."""
    if threading.current_thread() is not threading.main_thread():
        return False
    for number in SIGNALS:
        if not isinstance(earlier := signal.getsignal(number), Noting) and not _is_outside(number):
            signal.signal(number, Noting(earlier))
    return True


def _is_outside(number: int) -> bool:
    """Return whether a signal has a handler that Python doesn't know, as far as the system tells."""
    if callable(signal.getsignal(number)):
        return False
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return signal.getsignal(number) is None


def is_told() -> bool:
    """Return whether this process has got a signal at which its run saves and ends."""
    return _noted.number is not None


def leave_to(engine: Engine, stops: Callable[[], None], where: str) -> None:
    """Let a framework save and end the run, with files of its own: call a function in place of the save, at the end of the step.
    When it has saved, the framework calls `end`.

    Args:
        where: the place of the save, for the log.
    """
    vars(engine)[LEFT_TO] = stops, where


def _stop(engine: Engine) -> None:
    """Save, wait until the checkpoint is on disk, and end. Collective."""
    config = _config(engine)
    told = gathered(None if _noted.number is None else (_noted.number, time.monotonic() - _noted.since))
    folder = Path(config.folder)
    stops, where = vars(engine).get(LEFT_TO, (None, f"into {folder}"))
    _say(engine, told, where)
    if stops is not None:
        stops()
        return
    try:
        wait_for_save(engine)
    except SaveError as error:  # this save is another chance
        logger.error("the save before the signal failed: %s", error)
    is_there = any(gathered((folder / f"global_step{engine.global_steps}").is_dir()))
    try:
        with replaced(engine, **{IN_ONE_STEP: is_there}):
            getattr(engine, "save_checkpoint")(config.folder)  # noqa: B009
        end(engine)
    except SaveError:
        if dist.get_rank() == 0:
            logger.error(
                "step %s could not be saved; mend what the error says, and start again: the run goes on from the newest whole "
                "checkpoint of %s",
                engine.global_steps,
                folder,
            )
        raise


def end(engine: Engine) -> None:
    """End the run when all its saves are on disk. Collective.

    Raises:
        SystemExit: always, unless an earlier handler has raised something else.
        SaveError: on all ranks, if a save failed on one of them.
    """
    wait_for_save()
    statuses = gathered(status := _status(_config(engine)))
    if dist.get_rank() == 0:
        seconds = seconds_of_last_save(engine)
        logger.warning(
            "step %s is on disk%s; the run isn't at its end, and ends for now, with status %s",
            engine.global_steps,
            "" if seconds is None else f" after {seconds:.1f} s",
            _by_ranks(statuses),
        )
    end_quickly()
    raised, _noted.raised = _noted.raised, None
    raise SystemExit(status) if raised is None else raised


def _status(config: OnSignal) -> int:
    """Return the exit status. An agent of torch's whose workers all end with 0 waits for the others, for minutes: so a worker
    ends with 0 only if it was told to go itself."""
    is_told = ELASTIC_VARIABLE in os.environ and _noted.number is not None
    return 0 if is_told else config.exit_code


def _say(engine: Engine, told: Sequence[tuple[int, float] | None], where: str) -> None:
    if dist.get_rank() != 0:
        return
    came = {rank: each for rank, each in enumerate(told) if each is not None}
    names = sorted({_name(number) for number, _ in came.values()})
    longest, grace = max(seconds for _, seconds in came.values()), _config(engine).grace_seconds
    left = f"{grace - longest:.1f} s are left" if longest < grace else "the grace is over"
    logger.warning(
        "%s %.1f s ago on %s: step %s is saved %s; %s",
        " and ".join(names),
        longest,
        _some(sorted(came)),
        engine.global_steps,
        where,
        left,
    )


def _by_ranks(statuses: Sequence[int]) -> str:
    kinds = sorted(set(statuses))
    if len(kinds) == 1:
        return f"{kinds[0]} on all ranks"
    return " and ".join(f"{kind} on {_some([r for r, each in enumerate(statuses) if each == kind])}" for kind in kinds)


def _some(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:4]))}{f' and {len(ranks) - 4} more' if len(ranks) > 4 else ''}"


def _name(number: int) -> str:
    return signal.Signals(number).name


def _config(engine: Engine) -> OnSignal:
    found: OnSignal = engine.universal_checkpoint_config.save.on_signal
    return found
