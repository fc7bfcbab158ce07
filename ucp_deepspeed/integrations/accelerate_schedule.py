"""Accelerate's schedulers: one of torch's steps once for each process at each optimizer step, so that its speed depends on the
number of processes.

Scripts live with that in two ways. Some multiply the length of the schedule by the number of processes; then it goes on at the
position that this number gives. Others don't; then it goes on with as many steps as before. What a schedule's state holds is
restored with it. So only functions that the script makes anew can tell, and their values at some positions are recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any, NamedTuple

_STEPS = "_universal_checkpoint_steps"
"""Attribute of an Accelerate scheduler: how often it steps at each optimizer step, if that isn't the number of processes."""

_SETTINGS = (
    "Accelerator(step_scheduler_with_optimizer=False), with one scheduler.step() for each optimizer step, or split_batches=True "
    "in Accelerate's DataLoaderConfiguration, makes schedules independent of the number of processes"
)


class Told(NamedTuple):
    """A line for the log."""

    level: int
    text: str


def _step(wrapped: Callable[..., Any], scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from ucp_deepspeed.engine.replaced import replaced

    steps = vars(scheduler).get(_STEPS)
    if steps is None or not scheduler.step_with_optimizer or not scheduler.gradient_state.sync_gradients:
        return wrapped(*args, **kwargs)
    inner = scheduler.scheduler
    with replaced(scheduler, split_batches=True):  # one step for each call
        for _ in range(steps):
            if inner._step_count <= getattr(inner, "total_steps", inner._step_count):
                wrapped(*args, **kwargs)
    return None


def _own_steps(scheduler: Any) -> int | None:
    """Return how often a scheduler of Accelerate's steps at each optimizer step; None if the engine or the script steps it."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedSchedulerWrapper

    if isinstance(scheduler, DeepSpeedSchedulerWrapper) or not scheduler.step_with_optimizer:
        return None
    return 1 if scheduler.split_batches else int(AcceleratorState().num_processes)


def described(scheduler: Any) -> dict[str, Any]:
    """Return where a schedule stands: plain data."""
    steps, inner = vars(scheduler).get(_STEPS, _own_steps(scheduler)), scheduler.scheduler
    position = getattr(inner, "last_epoch", None)
    places = _places(position // steps if position is not None and steps else 0)
    return {
        "steps": steps,
        "rates": _rates(scheduler),
        "values": [[place, _values(inner, place * (steps or 1))] for place in places] if steps else [],
    }


def _rates(scheduler: Any) -> list[float] | None:
    try:
        return [float(rate) for rate in scheduler.get_last_lr()]
    except (AttributeError, AssertionError):  # before a first step
        return None


def _places(done: int) -> list[int]:
    """Return numbers of optimizer steps at which schedules are compared: those near the present one, and powers of two."""
    return sorted({*range(max(done - 2, 0), done + 3), *(2**power for power in range(24))})


def _functions(inner: Any) -> Iterator[Callable[[int], Any]]:
    """Yield the functions of a schedule, which aren't in its state, also those of schedules within it."""
    yield from getattr(inner, "lr_lambdas", ())
    for each in getattr(inner, "_schedulers", ()):
        yield from _functions(each)


def _values(inner: Any, position: int) -> list[float | None]:
    """Return what a schedule's functions give at a position; None where they give no number."""

    def value(function: Callable[[int], Any]) -> float | None:
        try:
            return float(function(position))
        except Exception:  # the user's own
            return None

    return [value(function) for function in _functions(inner)]


def go_on(scheduler: Any, saved: Mapping[str, Any] | None, processes: int | None) -> Told | None:
    """Let a schedule go on as the saved one would have. Return what is to be told.

    Args:
        saved: the result of `described`; None if the checkpoint has none.
        processes: the number of processes that saved it; None if nothing tells.
    """
    from accelerate.state import AcceleratorState

    vars(scheduler).pop(_STEPS, None)
    own, now = _own_steps(scheduler), int(AcceleratorState().num_processes)
    if own is None:
        return _of_engine(scheduler, saved) if processes != now else None
    if saved is None:
        before, held = (1 if scheduler.split_batches else processes), None
    else:
        before, held = saved["steps"], saved["values"]
    if before is None or before == own:
        return None
    inner = scheduler.scheduler
    if _gives(inner, held, before, before):
        vars(scheduler)[_STEPS] = before
        return Told(
            logging.INFO,
            f"the learning rate goes on with {before} steps of its schedule for each optimizer step, as before",
        )
    position = inner.last_epoch * own
    if _is_plain(inner) and position % before == 0 and _gives(inner, held, own, before):
        inner._step_count += position // before - inner.last_epoch
        inner.last_epoch = position // before
        return Told(
            logging.INFO,
            f"the learning rate's schedule was made for {own} processes, and goes on at its step {inner.last_epoch}",
        )
    return Told(
        logging.WARNING,
        f"the learning rate's schedule isn't the saved one, neither as it was nor scaled by the number of processes: it makes "
        f"{own} steps for each optimizer step, and made {before}; {_SETTINGS}",
    )


def _is_plain(inner: Any) -> bool:
    """Return whether the rate depends on nothing but the position."""
    from torch.optim.lr_scheduler import LambdaLR

    return isinstance(inner, LambdaLR)


def _gives(inner: Any, held: Sequence[Any] | None, steps: int, before: int) -> bool:
    """Return whether a restored schedule gives the saved rates with so many steps for each optimizer step."""
    if next(_functions(inner), None) is None:
        return steps == before  # all of it is in its state
    if held is None:
        return _is_plain(inner) and _gives_last(inner, steps, before)
    return all(_alike(_values(inner, place * steps), values) for place, values in held)


def _gives_last(inner: Any, steps: int, before: int) -> bool:
    """Return whether a schedule gives the last rates; all that is known without a record."""
    factors = _values(inner, inner.last_epoch * steps // before)
    rates = [None if factor is None else base * factor for base, factor in zip(inner.base_lrs, factors, strict=True)]
    return _alike(rates, [float(rate) for rate in inner.get_last_lr()])


def _alike(mine: Sequence[float | None], saved: Sequence[float | None]) -> bool:
    return len(mine) == len(saved) and all(
        (one is None) == (other is None) and (one is None or other is None or isclose(one, other, rel_tol=1e-9))
        for one, other in zip(mine, saved, strict=True)
    )


def _of_engine(scheduler: Any, saved: Mapping[str, Any] | None) -> Told | None:
    """Tell if a schedule that the engine steps gives other rates than it did: its length may follow the number of processes."""
    from accelerate.utils import DeepSpeedSchedulerWrapper

    rates = _rates(scheduler)
    if saved is None or not isinstance(scheduler, DeepSpeedSchedulerWrapper) or None in (rates, saved["rates"]):
        return None
    if rates == saved["rates"]:
        return None
    return Told(
        logging.WARNING,
        f"the engine's schedule gives the rates {rates}, and gave {saved['rates']} when it was saved: Accelerate divides "
        "DummyScheduler's total_num_steps by the number of processes; set total_num_steps and warmup_num_steps in the DeepSpeed "
        "config to the numbers that the run began with",
    )


WRAPPERS: dict[str, dict[str, Callable[..., Any]]] = {"accelerate.scheduler": {"AcceleratedScheduler.step": _step}}
"""By modules, and names in them."""
