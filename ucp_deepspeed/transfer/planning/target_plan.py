"""The answer of a plan for a topology; see `ucp_deepspeed.transfer.planning.targeting`."""

from __future__ import annotations

from dataclasses import dataclass

from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.obstacles import Obstacle
from ucp_deepspeed.transfer.planning.policies import Matching


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The work of one rank in a plan.

    Attributes:
        model_parallel_rank, data_parallel_rank: see `TargetRank`.
        bytes_read: bytes to copy out of files.
        bytes_held: bytes of the master weights and optimizer states in its partitions, in fp32, padding included.
        copies: strided blocks to copy.
        files: paths of the files that the blocks lie in.
    """

    model_parallel_rank: int
    data_parallel_rank: int
    bytes_read: int
    bytes_held: int
    copies: int
    files: frozenset[str]


@dataclass(frozen=True)
class TargetPlan:
    """The answer for one topology.

    Attributes:
        topology: the target's.
        matching: the parameters and buffers on both sides or on one, by logical name; None when the layouts aren't known.
        reset: whether all optimizer states start afresh.
        obstacles: why it is impossible; empty when it isn't.
        remarks: the assumptions behind the figures, in words.
        ranks: ordered by model-parallel and then data-parallel rank; empty when the topology is impossible.
        initialised: names that keep the model's values: in whole, or in further rows, or in their optimizer states alone.
        dropped: names in the checkpoint for which the model has no place, or no place for their optimizer states.
    """

    topology: Topology
    matching: Matching | None
    reset: bool
    obstacles: tuple[Obstacle, ...]
    remarks: tuple[str, ...] = ()
    ranks: tuple[RankPlan, ...] = ()
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Return whether a load on this topology would succeed, as far as the checkpoint tells."""
        return not self.obstacles

    @property
    def restored(self) -> tuple[str, ...]:
        """Logical names of the restored parameters and buffers that have no obstacle, in the model's order."""
        refused = {obstacle.name for obstacle in self.obstacles}
        return tuple(name for name in (self.matching.restored if self.matching else ()) if name not in refused)

    @property
    def files(self) -> frozenset[str]:
        """Paths of all files that some rank reads from."""
        return frozenset().union(*(rank.files for rank in self.ranks))
