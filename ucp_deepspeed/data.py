"""A sampler that continues at the same sample when the data-parallel size changes (``docs/data.md``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import MismatchError, UniversalCheckpointError

Indices = NDArray[np.int64]


class DataPositionError(UniversalCheckpointError):
    """A sampler's position, or its share of the stream, is impossible."""


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The endless sequence of indices that a run reads, computed on demand and never stored.

    Position ``p`` lies in epoch ``p // samples``; the positions of one epoch hold each index exactly once.

    Attributes:
        samples: number of samples in the dataset.
        seed: seed of all orders.
        shuffle: give each epoch an order of its own; if False, all epochs have the dataset's order.
    """

    samples: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataPositionError(f"a dataset of {self.samples} samples has nothing to read")

    def at(self, positions: Indices) -> Indices:
        """Indices at ascending positions."""
        epochs, places = np.divmod(positions, self.samples)
        if not self.shuffle or not len(positions):
            return places
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
            places[inside] = permuted(places[inside], self.samples, self.seed, epoch)
        return places


def permuted(places: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Map places by the permutation of ``range(size)`` that a seed and an epoch choose.

    The permutation is a Feistel network over the next larger square of a power of two, repeated for values outside ``size``. It
    uses integer arithmetic alone: no library version and no platform changes an order within an epoch, and it needs no memory.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode()).digest(), dtype="<u8")
    images = _permuted_square(places.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(images >= np.uint64(size))).size:
        images[outside] = _permuted_square(images[outside], half, keys)
    return images.astype(np.int64)


def _permuted_square(values: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ResumableSampler(Sampler[int]):
    """A data-parallel rank's share of a `SampleStream`, from any position on. It replaces torch's ``DistributedSampler``.

    One iteration is the rest of an epoch. Samples that a loader has prefetched aren't consumed: with `follow`, each iteration
    begins after the samples that the engine has trained on. Load before iterating, and begin an iteration only when the engine
    has taken all of the one before. If the script itself decides when to step (``managed_gradient_accumulation: false``), it must
    step before it begins another iteration.

    A torch ``DataLoader`` draws a seed for its workers from the default generator whenever an iteration begins; with a
    ``generator`` of its own it doesn't do so, and a resumed run draws the same random numbers as one never interrupted.

    Args:
        dataset: the dataset, or its number of samples.
        num_replicas: data-parallel size; `follow` takes it from the engine.
        rank: data-parallel rank; `follow` takes it from the engine.
        shuffle: give each epoch an order of its own.
        seed: seed of all orders; the same on all ranks and in all runs.
        global_batch_size: samples per optimizer step over all ranks, a multiple of ``num_replicas``; `follow` takes it too.
        begins_at: value of ``engine.global_samples`` when the run began with this dataset, if it read another one before.

    Raises:
        DataPositionError: a number is out of range.
    """

    def __init__(
        self,
        dataset: Sized | int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        *,
        global_batch_size: int | None = None,
        begins_at: int = 0,
    ) -> None:
        self.stream = SampleStream(dataset if isinstance(dataset, int) else len(dataset), seed, shuffle)
        self.num_replicas, self.rank, self.begins_at = num_replicas, rank, begins_at
        self._global_batch_size = num_replicas if global_batch_size is None else global_batch_size
        self._position = 0
        self._engine: Any = None
        if not 0 <= rank < num_replicas:
            raise DataPositionError(f"rank {rank} of {num_replicas} data-parallel ranks")
        if self._global_batch_size < 1 or self._global_batch_size % num_replicas:
            raise DataPositionError(
                f"a global batch of {self._global_batch_size} samples can't be shared by {num_replicas} data-parallel ranks"
            )

    def follow(self, engine: Any) -> ResumableSampler:
        """Take the share of the data and the position from a DeepSpeed engine, from now on; returns itself."""
        shares = engine.sequence_parallel_size  # ranks that read the same samples
        group = engine.seq_data_parallel_group
        self.num_replicas = dist.get_world_size(group=group) // shares
        self.rank = dist.get_rank(group=group) // shares
        self._engine = engine
        return self

    @property
    def position(self) -> int:
        """Samples of the stream that have been consumed, over all ranks."""
        if self._engine is None or not self._accumulates():
            return self._boundary
        steps = int(self._engine.micro_steps % self._engine.gradient_accumulation_steps())
        return self._boundary + steps * self._micro_batches

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next sample belongs to, from 0."""
        return self.position // self.stream.samples

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self._global_batch_size if self._engine is None else int(self._engine.train_batch_size())

    def set_position(self, samples: int) -> None:
        """Begin the next iteration after so many samples, over all ranks. Only for a sampler that follows no engine.

        Raises:
            DataPositionError: it is negative, or the sampler follows an engine.
        """
        if self._engine is not None:
            raise DataPositionError("this sampler follows an engine: its position is engine.global_samples")
        if samples < 0:
            raise DataPositionError(f"position {samples} lies before the first sample")
        self._position = samples

    def __len__(self) -> int:
        """Samples of this rank in the next iteration."""
        start, stop = self._ahead()
        return (stop - start) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Indices for this rank; the position is looked up when the first one is asked for."""
        (first, last), ranks = self._ahead(), self.num_replicas
        seen = handed = first
        for start in range(first, last, tunables.INDICES * ranks):
            stop = min(start + tunables.INDICES * ranks, last)
            for index in self.stream.at(np.arange(start + self.rank, stop, ranks)).tolist():
                if self._engine is not None:
                    seen = self._checked(seen, handed)
                yield index
                handed += ranks
        if self._engine is None:
            self._position = last

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the client state. With `follow` it isn't needed; loading it checks for a changed stream."""
        return self._identity() | {"position": self._boundary}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the saved position. With `follow`, check that it is the engine's position.

        Raises:
            MismatchError: the state is from another stream; lists dataset size, seed and whatever else differs.
            DataPositionError: the engine is at another position: its checkpoint isn't the one of this state, or isn't loaded yet.
        """
        changed = {key: now for key, now in self._identity().items() if state.get(key) != now}
        if changed:
            problems = [f"{key}: {state.get(key)!r} when saved, {now!r} now" for key, now in changed.items()]
            raise MismatchError("the sampler reads another stream than the one that was saved", problems)
        if self._engine is None:
            self.set_position(int(state["position"]))
        elif self._boundary != state["position"]:
            raise DataPositionError(
                f"the saved sampler stood at sample {state['position']}, the engine stands at {self._boundary}; "
                "load the engine's checkpoint first"
            )

    def _identity(self) -> dict[str, Any]:
        return asdict(self.stream) | {"begins_at": self.begins_at}

    def _ahead(self) -> tuple[int, int]:
        """Return the positions from which and up to which the next iteration goes, over all ranks.

        It goes to the end of the epoch, and on into the next one until the global batch is full.
        """
        batch = self.global_batch_size if self._accumulates() else self._micro_batches
        start, boundary, samples = self.position, self._boundary, self.stream.samples
        epoch_end = (start // samples + 1) * samples
        return start, boundary + -(-(epoch_end - boundary) // batch) * batch

    def _accumulates(self) -> bool:
        """Return whether the engine decides after how many micro-batches it steps. (Releases without this setting always do.)"""
        return bool(getattr(self._engine, "managed_gradient_accumulation", lambda: True)())

    @property
    def _micro_batches(self) -> int:
        """Samples of one micro-batch of each rank, over all ranks."""
        return int(self.global_batch_size // self._engine.gradient_accumulation_steps())

    @property
    def _boundary(self) -> int:
        """Position at which the present global batch began."""
        if self._engine is None:
            return self._position
        boundary = int(self._engine.global_samples) - self.begins_at
        if boundary < 0:
            raise DataPositionError(
                f"the engine stands at sample {self._engine.global_samples}; this dataset begins at sample {self.begins_at}"
            )
        return boundary

    def _checked(self, seen: int, handed: int) -> int:
        """Return the engine's position. It can't go back, nor pass the samples that were handed out."""
        position = self.position
        if not seen <= position <= handed:
            raise DataPositionError(
                f"the engine went from sample {seen} to {position}, and this iteration has handed out those before {handed}: "
                "it has loaded a checkpoint or trained on other data meanwhile; iterate over the loader anew"
            )
        return position
