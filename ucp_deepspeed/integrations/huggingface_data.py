"""The position of Hugging Face's Trainer in its data, counted in samples.

Trainer counts steps, and after a resume it skips as many batches of the size that they have now. Here each checkpoint says how
many samples of which epoch are done, over all ranks, and a resumed run goes on at the next one: of the same order, dealt to the
ranks that there are now. What is left of that epoch has steps of its own, and so the end of the run and of the schedule of
learning rates move with it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ucp_deepspeed.integrations.accelerate_data import batches_at_once
from ucp_deepspeed.integrations.huggingface_trainers import (
    STATE_NAME,
    Arguments,
    Keywords,
    Wrapped,
    given,
    is_first,
    trainer_is_on,
)

logger = logging.getLogger("ucp_deepspeed")

KEY = "ucp_data_position"
"""Key of the client state."""

DRAWN = "LengthGroupedSampler", "RandomSampler"
"""Samplers that draw their order from a stream which a resume doesn't put back."""

COURSE = "_universal_checkpoint_course"
"""Attribute of a Trainer: its `Course`."""


@dataclass(frozen=True, slots=True)
class Position:
    """The place of a run in its data.

    Attributes:
        consumed: samples of the epoch that are done, over all ranks.
        samples: of an epoch; None if nobody knows.
        global_batch: samples of a step, over all ranks.
        order: what decides in which order samples come.
    """

    epoch: int
    consumed: int
    samples: int | None
    global_batch: int
    order: str


_POSITION: TypeAdapter[Position | None] = TypeAdapter(Position | None)


@dataclass(frozen=True, slots=True)
class Saved:
    """Everything that a checkpoint tells of the position.

    Attributes:
        steps: steps of the run, as Trainer counts them.
        global_samples: samples of all steps, as DeepSpeed counts them: each step as a full one.
    """

    folder: Path
    steps: int
    global_samples: int | None
    position: Position | None


@dataclass(frozen=True, slots=True)
class Dealing:
    """The way a loader deals the samples of an epoch to the ranks, in turns.

    Attributes:
        sampler: gives the same order on any number of ranks; None if that isn't known.
        micro: samples that all ranks take at once.
        accumulation: micro-batches of a step.
        samples: of an epoch; None if nobody knows.
        even: whether the last micro-batch is filled up with the epoch's first samples.
        order: see `Position`.
    """

    sampler: Any
    micro: int
    accumulation: int
    ranks: int
    rank: int
    samples: int | None
    drop_last: bool
    even: bool
    order: str

    @property
    def global_batch(self) -> int:
        """Return the samples of a step."""
        return self.micro * self.accumulation


@dataclass(frozen=True, slots=True)
class Rest:
    """The rest of the epoch in which a resumed run begins.

    Attributes:
        start: samples of the epoch that are done.
        skipped: micro-batches that Trainer counts as done.
        micros: micro-batches that are left.
    """

    epoch: int
    start: int
    skipped: int
    micros: int


class Course:
    """A training: where it began, and where it stands."""

    def __init__(self, saved: Saved | None) -> None:
        self.saved = saved
        self.dealing: Dealing | None = None
        self.rest: Rest | None = None
        self.epoch, self.first_step, self.start, self.skipped, self.micros = 0, 0, 0, 0, 0

    def begin(self, epoch: int, steps: int, micros: int) -> Rest | None:
        """Begin an epoch. Return what is left of it, if it is the one in which the run was resumed."""
        rest = self.rest if self.rest is not None and self.rest.epoch == epoch else None
        self.epoch, self.first_step = epoch, steps
        self.start, self.skipped = (rest.start, rest.skipped) if rest is not None else (0, 0)
        self.micros = rest.micros if rest is not None else micros
        return rest

    def position(self, state: Any, stops: bool) -> Position | None:
        """Return the position that Trainer's state tells.

        Args:
            stops: whether the epoch ends here.
        """
        if (dealing := self.dealing) is None:
            return None
        done = 0
        if state.global_step > self.first_step:
            done = round((state.epoch - self.epoch) * (self.skipped + self.micros)) - self.skipped
        consumed = self.start + done * dealing.micro
        ends = stops or done >= self.micros or (dealing.samples is not None and consumed >= dealing.samples)
        epoch, consumed = (self.epoch + 1, 0) if ends else (self.epoch, consumed)
        return Position(epoch, consumed, dealing.samples, dealing.global_batch, dealing.order)


class RestOfEpoch:
    """Batches of one rank, of what is left of an epoch. It takes the place of accelerate's ``BatchSamplerShard``."""

    def __init__(self, dealing: Dealing, rest: Rest) -> None:
        self.sampler, self.drop_last = dealing.sampler, dealing.drop_last
        self._dealing, self._rest = dealing, rest

    def __len__(self) -> int:
        return self._rest.micros

    def __iter__(self) -> Iterator[list[int]]:
        dealing = self._dealing
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self._rest.epoch)
        order, share = list(self.sampler), dealing.micro // dealing.ranks
        for first in range(self._rest.start, len(order), dealing.micro):
            batch = order[first : first + dealing.micro]
            if len(batch) < dealing.micro and dealing.drop_last:
                return
            if dealing.even and dealing.ranks > 1:
                while len(batch) < dealing.micro:
                    batch = batch + order[: dealing.micro - len(batch)]
            if mine := batch[dealing.rank * share : (dealing.rank + 1) * share]:
                yield mine


def dealing_of(trainer: Any, loader: Any) -> Dealing:
    """Return how Trainer's loader deals samples."""
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
    from torch.utils.data import BatchSampler, SequentialSampler

    batches = getattr(loader, "batch_sampler", None)
    shard = batches if type(batches) is BatchSamplerShard else None
    inner = batches if shard is None else shard.batch_sampler
    accumulation = trainer.args.gradient_accumulation_steps
    micro = trainer.get_total_train_batch_size(trainer.args) // accumulation
    ranks, rank = (1, 0) if shard is None else (shard.num_processes, shard.process_index)
    sampler: Any = getattr(inner, "sampler", None)
    if type(sampler) is SeedableRandomSampler:
        order = f"shuffled by seed {sampler.initial_seed}"
    else:
        order = type(sampler).__name__ if sampler is not None else type(loader.dataset).__name__
    known = isinstance(loader, DataLoaderShard) and type(inner) is BatchSampler and trainer.get_sp_size() == 1
    known = known and type(sampler) in (SeedableRandomSampler, SequentialSampler)
    known = known and micro == loader.total_batch_size
    samples = None
    with suppress(TypeError):
        samples = len(sampler if known else loader.dataset)
    even, drop_last = shard is None or shard.even_batches, bool(getattr(inner, "drop_last", False))
    return Dealing(sampler if known else None, micro, accumulation, ranks, rank, samples, drop_last, even, order)


def read_saved(folder: Path) -> Saved | None:
    """Read what a checkpoint tells; None if it can't be opened, which its load then says. Collective."""
    from ucp_deepspeed.checkpoint import open_checkpoint
    from ucp_deepspeed.engine.agreement import agreement
    from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError, worded

    with agreement(tells=True) as told:
        if is_first() and (folder / STATE_NAME).is_file():
            steps = int(json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))["global_step"])
            try:
                checkpoint = open_checkpoint(folder)
                held = checkpoint.client_state()[1].get(KEY)
                position = _POSITION.validate_python(held)
                told.mine = Saved(folder, steps, checkpoint.run.global_samples, position)
            except ValidationError as error:
                raise DamagedCheckpointError(
                    f"the position in the data of {folder} can't be read: {worded(error.errors()[0])}; resume from another one"
                ) from error
            except UniversalCheckpointError:
                pass
    found: Saved | None = told.values[0]
    return found


def derived(saved: Saved, dealing: Dealing) -> Position | None:
    """Return the position of a checkpoint that doesn't tell it, from its steps and their samples; None if these don't tell
    either."""
    if not saved.steps or not saved.global_samples or saved.global_samples % saved.steps:
        return None
    batch = saved.global_samples // saved.steps
    epoch, done = 0, saved.steps
    if dealing.samples is not None:
        of_epoch = max(dealing.samples // batch if dealing.drop_last else math.ceil(dealing.samples / batch), 1)
        epoch, done = divmod(saved.steps, of_epoch)
    return Position(epoch, done * batch, dealing.samples, batch, dealing.order)


def rest_of(position: Position, dealing: Dealing, micros_of_epoch: int) -> Rest:
    """Return what is left of the epoch in which a position lies, and tell what can't be kept of it."""
    batch, accumulation = dealing.global_batch, dealing.accumulation
    start = position.consumed if dealing.samples is None else min(position.consumed, dealing.samples)
    if dealing.sampler is None or dealing.samples is None:
        steps = start // batch
        _tell_of_loss(position, dealing, start - steps * batch)
        skipped = steps * accumulation
        if dealing.samples is not None:
            skipped = min(skipped, micros_of_epoch)
        return Rest(position.epoch, steps * batch, skipped, max(micros_of_epoch - skipped, 0))
    _tell_of_loss(position, dealing, 0)
    left = (dealing.samples - start) / dealing.micro
    micros = math.floor(left) if dealing.drop_last else math.ceil(left)
    if start == 0:
        skipped = 0
    elif start % batch == 0:
        skipped = start // batch * accumulation
    else:  # Trainer takes part in no step, so that the epoch has some that are whole
        skipped = max(round(start / batch), 1) * accumulation
    return Rest(position.epoch, start, skipped, micros)


def _tell_of_loss(position: Position, dealing: Dealing, repeated: int) -> None:
    """Warn if samples come twice, or may, or never come."""
    if not position.consumed or not is_first():
        return
    where = f"{position.consumed} samples of epoch {position.epoch} were done"
    remedy = "give the run the dataset and the seed that it had, or begin at an epoch's end"
    other = position.samples != dealing.samples
    if (other and dealing.order != "SequentialSampler") or position.order != dealing.order:
        logger.warning(
            "%s, of %s in the order %r; now there are %s in the order %r: up to %d samples come twice in this epoch, and as many "
            "never; %s",
            *(where, position.samples, position.order, dealing.samples, dealing.order, position.consumed, remedy),
        )
    elif dealing.order in DRAWN or (
        dealing.sampler is None and dealing.samples is not None and position.global_batch != dealing.global_batch
    ):
        logger.warning(
            "%s, in an order that the package doesn't know (%s), with %d samples a step and not %d: up to %d samples come twice "
            "in this epoch, and as many never; %s",
            *(where, dealing.order, position.global_batch, dealing.global_batch, position.consumed, remedy),
        )
    elif repeated:
        logger.warning(
            "%s, and %d samples make a step now: the last %d of them come twice; choose a batch that divides %d to avoid it",
            *(where, dealing.global_batch, repeated, position.consumed),
        )


def _inner_training_loop(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    vars(trainer).pop(COURSE, None)
    if trainer_is_on(trainer):
        folder = given(wrapped, args, kwargs)["resume_from_checkpoint"]
        vars(trainer)[COURSE] = Course(None if folder is None else read_saved(Path(folder)))
    return wrapped(*args, **kwargs)


def _course(trainer: Any) -> Course | None:
    return vars(trainer).get(COURSE)


def _set_initial_training_values(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Let epochs and steps fit what is left of the epoch that the run resumes in."""
    values = wrapped(*args, **kwargs)
    course = _course(trainer)
    if course is None:
        return values
    epochs, of_epoch, examples, samples, batch, micros, most = values
    dealing = course.dealing = dealing_of(trainer, given(wrapped, args, kwargs)["dataloader"])
    if (saved := course.saved) is None:
        return values
    position = saved.position
    if position is None:
        position = derived(saved, dealing)
        if is_first():
            _tell_of_derived(saved, position, dealing)
    if position is None:
        return values
    rest = course.rest = rest_of(position, dealing, micros)
    left = math.ceil(rest.micros / dealing.accumulation)
    if dealing.samples is None:  # an epoch may have all steps of the run
        course.rest = replace(rest, micros=max(most - saved.steps, 0) * dealing.accumulation)
        return values
    if trainer.args.max_steps > 0:
        later = max(most - saved.steps - left, 0)
        epochs = rest.epoch + 1 + math.ceil(later / of_epoch)
    else:
        most = saved.steps + left + math.ceil(trainer.args.num_train_epochs * of_epoch) - (rest.epoch + 1) * of_epoch
    if most <= saved.steps:
        epochs, most = rest.epoch, max(most, saved.steps)
    if position.global_batch != dealing.global_batch and is_first():
        logger.info(
            "a step takes %d samples and not %d: the run goes on at sample %d of epoch %d, and ends at step %d; the learning "
            "rate follows its schedule to that step, and isn't scaled",
            *(dealing.global_batch, position.global_batch, rest.start, rest.epoch, most),
        )
    return epochs, of_epoch, examples, samples, batch, micros, most


def _tell_of_derived(saved: Saved, position: Position | None, dealing: Dealing) -> None:
    if position is None:
        logger.warning(
            "%s doesn't tell how many samples were done: Trainer counts %d steps of %d samples; if they had another size, "
            "samples come twice or never; save with the block on to keep the position",
            *(saved.folder, saved.steps, dealing.global_batch),
        )
    else:
        logger.log(
            logging.INFO if position.global_batch == dealing.global_batch else logging.WARNING,
            "%s doesn't tell its position in the data: by %d steps of %d samples it is sample %d of epoch %d",
            *(saved.folder, saved.steps, position.global_batch, position.consumed, position.epoch),
        )


def _init_training_state(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Return the epoch, and the micro-batches in it that Trainer counts as done."""
    counted = wrapped(*args, **kwargs)
    course = _course(trainer)
    if course is None or course.rest is None:
        return counted
    if trainer.args.ignore_data_skip:
        epoch, course.rest = course.rest.epoch, None
        return epoch, 0
    return course.rest.epoch, course.rest.skipped


def _prepare_for_training(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Have each save of the engine hold the position."""
    prepared = wrapped(*args, **kwargs)
    course = _course(trainer)
    if course is not None and trainer_is_on(trainer):
        from ucp_deepspeed.engine.client_state import add_to_client_state

        def position() -> dict[str, Any] | None:
            now = course.position(trainer.state, trainer.control.should_epoch_stop)
            return None if now is None else asdict(now)

        add_to_client_state(trainer.deepspeed, KEY, position)
    return prepared


def _run_epoch(wrapped: Wrapped, trainer: Any, args: Arguments, kwargs: Keywords) -> Any:
    course = _course(trainer)
    if course is None or course.dealing is None:
        return wrapped(*args, **kwargs)
    told = given(wrapped, args, kwargs)
    rest = course.begin(told["epoch"], trainer.state.global_step, told["steps_in_epoch"])
    if rest is not None:
        accumulation = course.dealing.accumulation
        told["steps_in_epoch"] = rest.skipped + rest.micros
        told["num_update_steps_per_epoch"] = rest.skipped // accumulation + math.ceil(rest.micros / accumulation)
        if course.dealing.sampler is not None and rest.skipped:
            told["train_dataloader"] = _Begun(told["train_dataloader"], course.dealing, rest)
        elif rest.skipped:
            told["train_dataloader"] = _Unknown(told["train_dataloader"])
    return wrapped(**told)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A loader whose epoch is begun; Trainer asks `_skip_first_batches` for the rest of it."""

    loader: Any
    dealing: Dealing
    rest: Rest


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A loader whose epoch is begun, and whose order isn't known."""

    loader: Any


def _skip_first_batches(wrapped: Wrapped, instance: None, args: Arguments, kwargs: Keywords) -> Any:
    """Skip samples, where Trainer skips batches."""
    told = given(wrapped, args, kwargs)
    begun = told["dataloader"]
    if isinstance(begun, _Unknown):  # accelerate alone skips batches of one process, where one reads them for all
        return wrapped(begun.loader, told["num_batches"] * batches_at_once(begun.loader))
    if not isinstance(begun, _Begun):
        return wrapped(*args, **kwargs)
    loader = wrapped(begun.loader, 0)
    loader.batch_sampler.batch_sampler = RestOfEpoch(begun.dealing, begun.rest)
    return loader


WRAPPERS: dict[str, Callable[..., Any]] = {
    "Trainer._inner_training_loop": _inner_training_loop,
    "Trainer.set_initial_training_values": _set_initial_training_values,
    "Trainer._init_training_state": _init_training_state,
    "Trainer._prepare_for_training": _prepare_for_training,
    "Trainer._run_epoch": _run_epoch,
    "skip_first_batches": _skip_first_batches,
}
