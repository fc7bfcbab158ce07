"""Accelerate's data loaders: where they stand, in samples over all processes, and ``skip_first_batches`` by samples.

A script counts batches, and after a resume on other processes, or with another batch size, a batch is another number of samples.
If it skips as many batches as were handed out when the checkpoint was saved, the loader goes on at the same sample. Any other
number is the script's own choice, and isn't touched.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import wrapt

from ucp_deepspeed.integrations.features import Feature

logger = logging.getLogger("ucp_deepspeed")

_COUNT = "_universal_checkpoint_count"
"""Attribute of a loader: its `Count`."""

_POSITION = "_universal_checkpoint_position"
"""Attribute of a loader: the `Position` that a load has found, until it is used."""


@dataclass
class Count:
    """Batches that a loader, or one made of it by ``skip_first_batches``, has handed out in this epoch.

    Attributes:
        batches: as a script counts them: with those that it asked to skip.
        samples: the samples in them, over all processes.
        order: the state of the generator from which the epoch's order was drawn, before that; None if there is none.
    """

    batches: int = 0
    samples: int = 0
    order: Any = None


@dataclass(frozen=True)
class Position:
    """The place at which a loader stood when it was saved.

    Attributes:
        epoch: the loader's epoch.
        batches: batches handed out in it, as the script counts them.
        samples: samples that the run has trained on in it.
        handed: samples handed out in it: those, and the ones of an accumulation that wasn't finished.
        batch: samples of a batch, over all processes.
        order: the state of the generator that draws the order of the samples after this place; None if there is none.
    """

    epoch: int
    batches: int
    samples: int
    handed: int
    batch: int
    order: Any = None


def wrap(feature: Feature) -> None:
    """Wrap ``skip_first_batches`` wherever it was imported to."""
    from accelerate import data_loader

    original = getattr(data_loader, "skip_first_batches", None)
    if original is None:
        feature.fails("skip_first_batches")
        return
    wrapped = wrapt.FunctionWrapper(original, feature.guarded(_skip))
    for module in list(sys.modules.values()):
        if isinstance(held := getattr(module, "__dict__", None), dict) and held.get("skip_first_batches") is original:
            held["skip_first_batches"] = wrapped


def count(loaders: Iterable[Any]) -> None:
    """Count the batches that loaders hand out from now on."""
    for loader in loaders:
        vars(loader).setdefault(_COUNT, Count())


def batch_of(loader: Any) -> int | None:
    """Return the number of samples in a loader's batch, over all processes; None if nothing tells."""
    shard = loader.dataset
    try:
        if _dispatches(loader):
            size = loader.batch_size if loader.batch_size is not None else loader.batch_sampler.batch_size
            return int(size * (1 if loader.split_batches else loader.state.num_processes))
        if hasattr(shard, "split_batches") and hasattr(shard, "num_processes"):  # of an iterable dataset
            return int(shard.batch_size * (1 if shard.split_batches else shard.num_processes))
        return int(loader.total_batch_size)
    except (AttributeError, TypeError):
        return None


def _dispatches(loader: Any) -> bool:
    """Return whether one process reads the batches of all."""
    from accelerate.data_loader import DataLoaderDispatcher

    return isinstance(loader, DataLoaderDispatcher)


def described(loader: Any, begun: int) -> dict[str, Any] | None:
    """Return where a loader stands: plain data, or None if that can't be told.

    Args:
        begun: micro-batches of an accumulation that isn't finished.
    """
    held, batch = vars(loader).get(_COUNT), batch_of(loader)
    if held is None or batch is None:
        return None
    samples = held.samples - min(begun, held.samples // batch) * batch
    return {
        "epoch": int(getattr(loader, "iteration", 0)),
        "batches": held.batches,
        "samples": samples,
        "handed": held.samples,
        "batch": batch,
        "order": held.order if samples and not _is_at_end(loader, samples) else _order(loader),
    }


def _drawing(loader: Any) -> Any:
    """Return the sampler that draws a loader's order from a generator, anew in each epoch; None if there is none."""
    from accelerate.data_loader import SeedableRandomSampler
    from torch import Generator

    found, deeper = loader, loader
    while deeper is not None:  # not by truth: a stream's sampler has no length
        found, batches = deeper, getattr(deeper, "batch_sampler", None)
        deeper = batches if batches is not None else getattr(deeper, "sampler", None)
    if found is loader or isinstance(found, SeedableRandomSampler) or not hasattr(found, "generator"):
        return None
    is_torchs = found.generator is None or isinstance(
        found.generator, Generator
    )  # any sampler may have such an attribute
    return found if is_torchs else None


def _order(loader: Any) -> Any:
    """Return the state of the generator that draws a loader's next order; None if it has none of its own."""
    generator = getattr(_drawing(loader), "generator", None)
    return None if generator is None else generator.get_state()


def go_on(loader: Any, saved: Mapping[str, Any] | None, tells: bool) -> None:
    """Keep where a loader stood, for ``skip_first_batches``."""
    vars(loader).pop(_POSITION, None)
    batch = batch_of(loader)
    if saved is None or batch is None or _COUNT not in vars(loader):
        return
    position = Position(**saved)
    vars(loader)[_COUNT], vars(loader)[_POSITION] = Count(), position
    _draw_again(loader, position, tells)
    if getattr(loader, "use_stateful_dataloader", False):
        _go_on_alone(loader, vars(loader).pop(_POSITION), batch)
        return
    loader.iteration = position.epoch + _is_at_end(loader, position.samples)  # a script may never call set_epoch
    if tells and position.handed and (position.batch != batch or position.samples != position.handed):
        logger.info(
            "a data loader stood at sample %d of epoch %d, after %d batches of %d; a batch has %d samples now: "
            "skip_first_batches(loader, %d) goes on at that sample",
            position.samples,
            position.epoch,
            position.batches,
            position.batch,
            batch,
            position.batches,
        )


def _draw_again(loader: Any, position: Position, tells: bool) -> None:
    """Let a loader draw the order that the saved run had drawn. Warn in the middle of an epoch whose order can't be had."""
    sampler = _drawing(loader)
    if sampler is not None and position.order is not None:
        import torch

        sampler.generator = torch.Generator() if sampler.generator is None else sampler.generator
        sampler.generator.set_state(position.order)
        return
    unknown = sampler is not None or position.order is not None
    if tells and unknown and position.samples and not _is_at_end(loader, position.samples):
        logger.warning(
            "a data loader stood at sample %d of epoch %d, whose order can't be drawn again: of the other samples some are "
            "repeated and some skipped; DataLoaderConfiguration(use_seedable_sampler=True), when the run starts and whenever it "
            "resumes, keeps the order",
            position.samples,
            position.epoch,
        )


def _is_at_end(loader: Any, samples: int) -> bool:
    """Return whether a number of samples is all of an epoch."""
    try:
        return samples > 0 and bool(samples >= loader.total_dataset_length)
    except (AttributeError, TypeError):  # a stream
        return False


def _go_on_alone(loader: Any, position: Position, batch: int) -> None:
    """Let a stateful loader go on by itself, as it does after a load: by its own state, which counts batches of one process, if
    that says the same; otherwise by the position."""
    own = getattr(loader.base_dataloader, "next_iter_state", None) or {}
    shot = own.get("_snapshot") or {}
    batches = own.get("_num_yielded", shot.get("_snapshot_step", 0) + own.get("_steps_since_snapshot", 0))
    if batches * batch == position.samples == position.handed:
        vars(loader)[_SKIPPED] = position.batches, position.samples
        return
    loader.base_dataloader.load_state_dict({})
    if position.samples < loader.total_dataset_length:  # otherwise the epoch was over
        vars(loader)[_AHEAD] = position


_AHEAD = "_universal_checkpoint_ahead"
"""Attribute of a stateful loader: the `Position` at which its next iteration begins."""


def _from(position: Position, loader: Any, held: Count) -> Iterator[Any]:
    """Iterate over what a stateful loader has from a position on."""
    from accelerate.data_loader import skip_first_batches

    batch = batch_of(loader) or 0
    made, skipped = _at(getattr(skip_first_batches, "__wrapped__", skip_first_batches), loader, position, batch)
    vars(made).update({_COUNT: held, _SKIPPED: (position.batches, skipped), _BATCH: batch})
    _count_the_rest(made, loader, skipped, batch)
    yield from made
    loader.iteration += 1


def _iterate(wrapped: Callable[..., Any], loader: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held = vars(loader).get(_COUNT)
    if held is not None and (position := vars(loader).pop(_AHEAD, None)) is not None:
        return _from(position, loader, held)
    return wrapped() if held is None else _counted(loader, held, wrapped())


def _counted(loader: Any, held: Count, batches: Iterator[Any]) -> Iterator[Any]:
    """Hand a loader's batches on, and count them."""
    start = vars(loader).get(_SKIPPED) if _BATCH in vars(loader) else vars(loader).pop(_SKIPPED, None)
    held.batches, held.samples = (0, 0) if start is None else start
    held.order = _order(loader)
    batch = vars(loader)[_BATCH] if _BATCH in vars(loader) else batch_of(loader) or 0
    for item in batches if not held.samples else _without_draws(batches):
        held.batches += 1
        held.samples += batch
        yield item
    held.batches = held.samples = 0
    if (whole := vars(loader).get(_WHOLE)) is not None:
        whole.iteration = max(whole.iteration, loader.iteration)


_WHOLE = "_universal_checkpoint_whole"
"""Attribute of a loader that skips to a loaded position: the loader whose next epoch comes after this one."""

_SKIPPED = "_universal_checkpoint_skipped"
"""Attribute of a loader that skips: batches, as the script counts them, and samples. Of a stateful one: for its next epoch."""

_BATCH = "_universal_checkpoint_batch"
"""Attribute of a loader that skips: its `batch_of`."""


def _without_draws(batches: Iterator[Any]) -> Iterator[Any]:
    """Hand batches on; what torch's loader draws from the default stream to begin is put back. In the middle of an epoch the run
    that was saved had drawn it long before."""
    import torch

    state = torch.get_rng_state()
    for index, batch in enumerate(batches):
        if index == 0:
            torch.set_rng_state(state)
        yield batch


def _skip(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def called(dataloader: Any, num_batches: int = 0) -> Any:
        held = vars(dataloader).get(_COUNT)
        if held is None:
            return wrapped(dataloader, num_batches)
        batch = batch_of(dataloader) or 0
        position: Position | None = vars(dataloader).pop(_POSITION, None)
        skipped = num_batches * batch
        if position is None or not batch:
            made = wrapped(dataloader, num_batches)
        elif num_batches in (position.batches, position.handed / position.batch):
            made, skipped = _at(wrapped, dataloader, position, batch)
        else:
            _tell_of(position, skipped, batch)
            made = wrapped(dataloader, num_batches)
        if position is not None:
            vars(made)[_WHOLE] = dataloader
        vars(made).update({_COUNT: held, _SKIPPED: (num_batches, skipped), _BATCH: batch})
        _count_the_rest(made, dataloader, skipped, batch)
        return made

    return called(*args, **kwargs)


def _count_the_rest(made: Any, loader: Any, skipped: int, batch: int) -> None:
    """Let ``gather_for_metrics`` drop what fills the last batch up, in a loader that was made to skip samples."""
    from torch.utils.data import IterableDataset

    begin = made.begin

    def begun() -> None:
        begin()
        with suppress(TypeError):  # a dataset without a length
            made.remainder = (len(made.dataset) - skipped) % batch

    if batch and not loader._drop_last and not isinstance(made.dataset, IterableDataset) and not _dispatches(made):
        made.begin = begun


def _tell_of(position: Position, skipped: int, batch: int) -> None:
    """Warn if samples that a script skips aren't those that were trained on."""
    if skipped == position.samples or not _tells():
        return
    amount = abs(skipped - position.samples)
    logger.warning(
        "skip_first_batches skips %d samples, and the checkpoint stands at sample %d of epoch %d: %d samples are %s; "
        "skip_first_batches(loader, %d) in epoch %d goes on where it stands",
        skipped,
        position.samples,
        position.epoch,
        amount,
        "skipped" if skipped > position.samples else "repeated",
        position.batches,
        position.epoch,
    )


def _tells() -> bool:
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)


def _at(wrapped: Callable[..., Any], loader: Any, position: Position, batch: int) -> tuple[Any, int]:
    """Return a loader that goes on at a position, and the samples that it skips."""
    whole, rest = divmod(position.samples, batch)
    if rest == 0 and not _dispatches(loader):
        return wrapped(loader, whole), position.samples
    made = wrapped(loader, 0)
    if _skip_samples(made, position.samples):
        return made, position.samples
    if rest and _tells():
        logger.warning(
            "the checkpoint stands at sample %d of epoch %d, within a batch of %d samples: %d samples are repeated; choose batch "
            "sizes of which %d is a multiple",
            position.samples,
            position.epoch,
            batch,
            rest,
            position.samples,
        )
    return wrapped(loader, whole * batches_at_once(loader)), position.samples - rest


def batches_at_once(loader: Any) -> int:
    """Return how many batches of its sampler a loader hands out as one: those of all processes, if one process reads them."""
    if not _dispatches(loader) or loader.split_batches or getattr(loader, "batch_sampler", None) is None:
        return 1
    from torch.utils.data import IterableDataset

    return 1 if isinstance(loader.dataset, IterableDataset) else int(loader.state.num_processes)


def _skip_samples(made: Any, samples: int) -> bool:
    """Let a loader with torch's own batch sampler skip samples, and not batches. Return whether it can."""
    from copy import copy

    from torch.utils.data import BatchSampler

    skipping = getattr(made, "batch_sampler", None)
    shard = getattr(skipping, "batch_sampler", None)
    inner = getattr(shard, "batch_sampler", shard)
    if skipping is None or shard is None or inner is None or type(inner) is not BatchSampler:
        return False
    later = BatchSampler(Later(inner.sampler, samples), inner.batch_size, inner.drop_last)
    if shard is inner:
        skipping.batch_sampler = later
    else:
        skipping.batch_sampler = copy(shard)
        skipping.batch_sampler.batch_sampler = later
    return True


class Later:
    """A sampler without its first samples.

    Attributes:
        sampler: the whole sampler.
        samples: how many are left out.
    """

    def __init__(self, sampler: Any, samples: int) -> None:
        self.sampler, self.samples = sampler, samples

    def __iter__(self) -> Iterator[int]:
        """Yield the other samples."""
        for index, sample in enumerate(self.sampler):
            if index >= self.samples:
                yield sample

    def __len__(self) -> int:
        """Return how many there are."""
        return max(len(self.sampler) - self.samples, 0)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to samplers that take one."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


WRAPPERS: dict[str, dict[str, Callable[..., Any]]] = {
    "accelerate.data_loader": {"DataLoaderShard.__iter__": _iterate, "DataLoaderDispatcher.__iter__": _iterate},
}
"""By modules, and names in them."""
