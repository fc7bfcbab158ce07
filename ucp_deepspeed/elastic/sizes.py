"""Numbers of ranks on which a run can go on: what its batch and its model-parallel sizes allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


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

    def __str__(self) -> str:
        parallel = f"TP{self.tensor}·PP{self.pipeline}" if self.tensor * self.pipeline > 1 else ""
        batch = "" if self.batch is None else f"a batch of {self.batch}"
        least = f"a data-parallel size of {self.least} and more" if self.least > 1 else ""
        return ", ".join(filter(None, (parallel, batch, least))) or "any number of ranks"


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
