"""Numbers of ranks on which a run can go on: what its batch and its model-parallel sizes allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.layout import Topology


@dataclass(frozen=True)
class Range:
    """A range of numbers, as ``2`` or ``1:4``."""

    least: int
    most: int

    @classmethod
    def parse(cls, option: str, text: str) -> Range:
        """Read the range that an option gives.

        Raises:
            ConfigError: it is none.
        """
        least, _, most = text.partition(":")
        if not all(part.isdecimal() for part in (least, most or least)) or not 0 < int(least) <= int(most or least):
            raise ConfigError(f"{option} takes a number or a range, such as 4 or 1:4, not {text!r}")
        return cls(int(least), int(most or least))

    @property
    def divisors(self) -> tuple[int, ...]:
        """Return the numbers in it that divide the largest one."""
        return tuple(size for size in range(self.least, self.most + 1) if self.most % size == 0)

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


@dataclass(frozen=True)
class Sizes:
    """Conditions on a number of ranks.

    Attributes:
        batch: samples of one step over all ranks, which must be a multiple of the data-parallel size; None if it may change.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        least: smallest data-parallel size.
    """

    batch: int | None = None
    tensor: int = 1
    pipeline: int = 1
    least: int = 1

    def data_parallel(self, ranks: int) -> int | None:
        """Return the data-parallel size on a number of ranks, or None if the run can't go on with all of them."""
        size, rest = divmod(ranks, self.tensor * self.pipeline)
        fits = not rest and size >= max(self.least, 1) and (self.batch is None or self.batch % size == 0)
        return size if fits else None

    def up_to(self, ranks: int) -> Iterator[int]:
        """Yield the numbers of ranks that fit, the largest first, up to this one."""
        step = self.tensor * self.pipeline
        yield from (size for size in range(ranks - ranks % step, 0, -step) if self.data_parallel(size) is not None)

    def largest(self, ranks: int) -> int | None:
        """Return the largest number of ranks that fits, up to this one; None if none does."""
        return next(self.up_to(ranks), None)

    def topology(self, ranks: int) -> Topology | None:
        """Return the topology on as many ranks as fit, up to this number; None if none do."""
        fitting = self.largest(ranks)
        return None if fitting is None else Topology(self.tensor, self.pipeline, self.data_parallel(fitting) or 1)

    def __str__(self) -> str:
        parallel = f"TP{self.tensor}·PP{self.pipeline}" if self.tensor * self.pipeline > 1 else ""
        batch = "" if self.batch is None else f"a batch of {self.batch}"
        least = f"a data-parallel size of {self.least} and more" if self.least > 1 else ""
        return ", ".join(filter(None, (parallel, batch, least))) or "any number of ranks"


@dataclass(frozen=True)
class Auto:
    """The choices of ``--topology auto``, and what they depend on.

    Attributes:
        checkpoint: the folder of the run's checkpoints.
        memory: bytes that a rank has for weights and states; None if they don't matter.
        tensor: tensor-parallel sizes to choose from.
        pipeline: numbers of pipeline stages, likewise.
        ranks: number of ranks if all nodes are there.
    """

    checkpoint: str
    memory: int | None
    tensor: tuple[int, ...]
    pipeline: tuple[int, ...]
    ranks: int

    def alternatives(self, sizes: Sizes) -> list[Sizes]:
        """Return the conditions for each pair of model-parallel sizes; those that cut a model least come first."""
        pairs = sorted(product(self.tensor, self.pipeline), key=lambda pair: (pair[0] * pair[1], pair[1]))
        return [replace(sizes, tensor=tensor, pipeline=pipeline) for tensor, pipeline in pairs]


def named(topology: Topology) -> str:
    """``TP2·PP1·DP4``."""
    return f"TP{topology.tp}·PP{topology.pp}·DP{topology.dp}"


def micro_batch(batch: int, largest: int, data_parallel: int) -> int | None:
    """Return the largest micro-batch with which a batch can be made, or None if the ranks can't share it evenly.

    Args:
        batch: samples of one step over all ranks.
        largest: most samples that a rank takes at once.
        data_parallel: number of ranks that share the batch.
    """
    share, rest = divmod(batch, data_parallel)
    if rest or share == 0:
        return None
    return next(size for size in range(min(largest, share), 0, -1) if share % size == 0)
