"""The position in the data of a run with Lightning, counted in samples.

Lightning counts batches of the loader. When it resumes within an epoch, it runs the batches that are left, but takes them from
the loader's beginning. Here the samples of the epoch that have been trained on are saved. A resumed epoch begins at the next one
of the order that torch's ``DistributedSampler`` gives all ranks together, and Lightning's counters become those of the batches
that are now left.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

from ucp_deepspeed.integrations import is_on
from ucp_deepspeed.integrations.features import Feature

logger = logging.getLogger("ucp_deepspeed")

Wrapped = Callable[..., Any]

LOST = "the place within an epoch is Lightning's own, which takes the rest of it from the loader's beginning"
"""Everything that isn't kept without the wrappers here."""

FEATURES: dict[str, Feature] = {}
"""The feature of the wrappers here, by Lightning's package."""

KEY = "ucp_lightning"
"""Key of the client state: the result of `position_of`."""

_BEGAN = "_universal_checkpoint_began"
"""Attribute of a fit loop: batches that its counter had, and samples that were trained on, when the present epoch began here."""

_LIMITS = "_universal_checkpoint_limits"
"""Attribute of a fit loop: numbers of batches that hold again from the next epoch on."""

_PLACED = "_universal_checkpoint_placed"
"""Attribute of an engine: whether its loop has been put at the position that was loaded."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """An epoch's order of samples, dealt by Lightning's sampler to all ranks.

    Attributes:
        batch: samples of one batch, over all ranks.
    """

    sampler: Any
    batches: Any
    batch: int

    @property
    def samples(self) -> int:
        """Return how many samples an epoch has, before the sampler fills up the last round."""
        return len(self.sampler.dataset)

    @property
    def order(self) -> dict[str, Any]:
        """Return what decides the order of these samples."""
        return {"seed": self.sampler.seed, "shuffle": self.sampler.shuffle}

    def left_after(self, position: int) -> int:
        """Return how many batches the samples after a position make."""
        ranks, size, left = self.sampler.num_replicas, self.batches.batch_size, max(self.samples - position, 0)
        each = left // ranks if self.sampler.drop_last else -(-left // ranks)
        return int(each // size if self.batches.drop_last else -(-each // size))


class Rest(Sampler[Any]):
    """A ``DistributedSampler`` whose next iteration begins within the epoch, and keeps to the order of a run before."""

    def __init__(self, sampler: Any, position: int, order: dict[str, Any]) -> None:
        self.sampler, self._position, self._order = sampler, position, order

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        position, self._position = self._position, 0
        if not position:
            return iter(self.sampler)
        ranks, rank = self.sampler.num_replicas, self.sampler.rank
        with _dealing_to_one(self.sampler, self._order):
            left = list(self.sampler)[position:]
        if self.sampler.drop_last:
            left = left[: len(left) // ranks * ranks]
        elif left and (short := -len(left) % ranks):  # as torch fills up the last round
            left += (left * -(-short // len(left)))[:short]
        return iter(left[rank::ranks])


@contextmanager
def _dealing_to_one(sampler: Any, order: dict[str, Any]) -> Iterator[None]:
    """Let a sampler give an order of all ranks together."""
    samples = len(sampler.dataset)
    one = {"num_replicas": 1, "rank": 0, "num_samples": samples, "total_size": samples, **order}
    own = {name: getattr(sampler, name) for name in one}
    vars(sampler).update(one)
    try:
        yield
    finally:
        vars(sampler).update(own)


def dealt(fit_loop: Any) -> Dealt | str:
    """Return how the samples are dealt, or why that can't be told."""
    loaders = [] if fit_loop._combined_loader is None else fit_loop._combined_loader.flattened
    if len(loaders) != 1:
        return f"there are {len(loaders)} loaders"
    loader = loaders[0]
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return "the loader isn't torch's DataLoader"
    if type(loader.batch_sampler) is not BatchSampler:
        return "the loader has a batch sampler of its own, or none"
    sampler = loader.batch_sampler.sampler
    sampler = sampler.sampler if isinstance(sampler, Rest) else sampler
    if not isinstance(sampler, DistributedSampler):
        return f"the loader's sampler is a {type(sampler).__name__}, not the one that Lightning puts in"
    return Dealt(sampler, loader.batch_sampler, loader.batch_sampler.batch_size * sampler.num_replicas)


def to_be_saved(trainer: Any, engine: Any) -> dict[str, Any] | None:
    """Return `position_of`; None in a version of Lightning that doesn't tell it."""
    module = type(trainer).__mro__[-2].__module__  # a user's class may be derived from Lightning's
    for root, feature in FEATURES.items():
        if module.startswith(f"{root}."):
            found: dict[str, Any] | None = feature.attempt(position_of, trainer, engine)
            return found
    return None


def position_of(trainer: Any, engine: Any) -> dict[str, Any]:
    """Return what a save keeps: the samples of this epoch whose gradients have been stepped on, and the epoch's order."""
    loop, found = trainer.fit_loop, dealt(trainer.fit_loop)
    done, batches = loop.epoch_loop.batch_progress.current.processed, loop.max_batches
    kept = {"batches": None if batches == float("inf") else batches, "ranks": trainer.world_size}
    if isinstance(found, str):
        return kept
    counted, began = vars(loop).get(_BEGAN, (0, 0))
    pending = engine.micro_steps % engine.gradient_accumulation_steps()
    trained = began + (done - pending - counted) * found.batch
    return {**kept, "trained": min(max(trained, 0), found.samples), "samples": found.samples, "order": found.order}


def after_data(wrapped: Wrapped, fit_loop: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put a resumed loop, whose loader is there now, at the position that its engine has loaded."""
    wrapped(*args, **kwargs)
    engine = fit_loop.trainer.strategy.model
    if not fit_loop.is_resuming or not is_on(engine) or vars(engine).get(_PLACED) or fit_loop._combined_loader is None:
        return
    setattr(engine, _PLACED, True)
    from ucp_deepspeed.engine.client_state import LOADED

    _put(fit_loop, vars(engine).get(LOADED, {}).get(KEY), engine.global_rank == 0)


def _put(fit_loop: Any, saved: dict[str, Any] | None, tells: bool) -> None:
    current, length = fit_loop.epoch_loop.batch_progress.current, fit_loop.max_batches
    if not current.processed:
        return
    batches = None if saved is None else saved["batches"]
    if _has_ended(fit_loop) or (batches is not None and current.processed >= batches):
        _shift(fit_loop, length)
        _begin_next_epoch(fit_loop)
        return
    found = dealt(fit_loop)
    reason = found if isinstance(found, str) else _reason(found, saved)
    if reason is not None or isinstance(found, str) or saved is None:
        if tells and not _is_loaders_own(fit_loop, saved):
            _tell_of_lightnings_way(fit_loop, saved, f"{reason}")
        return
    position, limit = saved["trained"], length * found.batch
    left = min(found.left_after(position), -(-max(limit - position, 0) // found.batch))
    steps = fit_loop.trainer.accumulate_grad_batches
    counted = (length - left) // steps * steps  # the engine begins to accumulate anew
    fit_loop.epoch_loop.batch_progress.is_last_batch = False
    _shift(fit_loop, counted)
    setattr(fit_loop, _BEGAN, (counted, position))
    _limit(fit_loop, counted + left)
    found.batches.sampler = Rest(found.sampler, position, saved["order"])
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    if tells:
        told = "the epoch goes on after %d of its %d samples, with %d batches of %d; its order has seed %d, as before"
        logger.info(told, position, found.samples, left, found.batch, saved["order"]["seed"])
    if tells and type(found.sampler) is not DistributedSampler:
        logger.warning(
            "the rest of the epoch holds each sample once only if your own sampler gives the order of the interrupted run again"
        )


def _is_loaders_own(fit_loop: Any, saved: dict[str, Any] | None) -> bool:
    """Return whether all loaders have a state of their own, which Lightning restores, and the ranks are as many as before."""
    loaders = fit_loop._combined_loader.flattened
    stateful = all(hasattr(each, "state_dict") and hasattr(each, "load_state_dict") for each in loaders)
    return stateful and (saved is None or saved["ranks"] == fit_loop.trainer.world_size)


def _has_ended(fit_loop: Any) -> bool:
    """Return whether the epoch was at its end, and not only its batches."""
    epoch = fit_loop.epoch_progress.current
    return bool(epoch.ready == epoch.started == epoch.processed)


def _begin_next_epoch(fit_loop: Any) -> None:
    """Let a loop whose epoch had ended in every respect begin the next one. With ``max_steps`` Lightning would begin the ended
    one again, with a single batch, and so leave out the next."""
    if _has_ended(fit_loop):
        base = next(each for each in type(fit_loop).__mro__[1:] if "restarting" in vars(each))
        vars(base)["restarting"].fset(fit_loop, False)


def _reason(found: Dealt, saved: dict[str, Any] | None) -> str | None:
    """Return why the saved position is none in the live order."""
    if saved is None or "order" not in saved:
        return "the checkpoint doesn't say how many samples of the epoch were trained on"
    if saved["samples"] != found.samples:
        return f"the epoch had {saved['samples']} samples when it was saved, and has {found.samples} now"
    return None


def _tell_of_lightnings_way(fit_loop: Any, saved: dict[str, Any] | None, reason: str) -> None:
    """Warn of the samples that Lightning takes again: those of the batches that are left, from the loader's beginning."""
    done, length = fit_loop.epoch_loop.batch_progress.current.processed, fit_loop.max_batches
    left = done if length == float("inf") else max(length - done, 0)
    sizes = [
        getattr(each, "batch_size", None) or getattr(getattr(each, "batch_sampler", None), "batch_size", None)
        for each in fit_loop._combined_loader.flattened
    ]
    size = sizes[0] if len(sizes) == 1 else None
    again = (
        f"its first {left} batches"
        if size is None
        else f"its first {left * size * fit_loop.trainer.world_size} samples"
    )
    trained = None if saved is None else saved.get("trained")
    logger.warning(
        "the position within the epoch can't be kept, since %s: Lightning takes the rest of the epoch from the loader's "
        "beginning, so %s are used again%s; resume at the end of an epoch, or use one DataLoader with the sampler that "
        "Lightning puts in",
        reason,
        again,
        "" if trained is None else f", after {trained} samples that were trained on",
    )


def _shift(fit_loop: Any, processed: int) -> None:
    """Let the counters of batches count others, so that so many were processed."""
    progress = fit_loop.epoch_loop.batch_progress
    change = processed - progress.current.processed
    for tracker in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(tracker, name, getattr(tracker, name) + change)


def _limit(fit_loop: Any, length: int) -> None:
    """Let this epoch have another number of batches."""
    trainer, before = fit_loop.trainer, fit_loop.max_batches
    if length == before:
        return
    setattr(fit_loop, _LIMITS, (before, trainer.val_check_batch))
    fit_loop.max_batches = length
    if trainer.val_check_batch == before:
        trainer.val_check_batch = length


def begin_epoch(wrapped: Wrapped, epoch_loop: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin an epoch, or its rest: with the loader at its position, and the random streams where they were saved."""
    fit_loop = epoch_loop.trainer.fit_loop
    engine = epoch_loop.trainer.strategy.model
    if not is_on(engine):
        wrapped(*args, **kwargs)
        return
    fetcher = args[0] if args else kwargs["data_fetcher"]
    if fit_loop.is_resuming:
        _begin_resumed(fit_loop, engine, fetcher)
    else:
        vars(fit_loop).pop(_BEGAN, None)
        if (limits := vars(fit_loop).pop(_LIMITS, None)) is not None:
            fit_loop.max_batches, epoch_loop.trainer.val_check_batch = limits
    wrapped(*args, **kwargs)


def _begin_resumed(fit_loop: Any, engine: Any, fetcher: Any) -> None:
    """Take the loader's iterator anew: Lightning's is from before the sampler knew the epoch. A run that wasn't interrupted draws
    from the random streams for it at the beginning of an epoch, and not within one."""
    from ucp_deepspeed.engine.random_state import restore_again

    within = fit_loop.epoch_loop.batch_progress.current.ready > 0
    if not within:
        restore_again(engine)
    iter(fetcher)
    fetcher.length = None if fetcher.length is None else fit_loop.max_batches
    if within:
        restore_again(engine)


WRAPPERS: dict[str, dict[str, Wrapped]] = {
    "loops.fit_loop": {"_FitLoop.setup_data": after_data},
    "loops.training_epoch_loop": {"_TrainingEpochLoop.on_run_start": begin_epoch},
}
"""By modules of Lightning's package, and names in them."""
