"""The run, as ``ucp run`` tells it to its workers in a variable of the environment; and a worker's place in a round."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import TypeAdapter

from ucp_deepspeed.elastic.sizes import Auto, Sizes

VARIABLE = "UCP_RUN"


@dataclass(frozen=True)
class Job:
    """A run, as all its agents know it, and the name of this node.

    Attributes:
        run: name of the run; agents of the same name meet.
        store: ``host:port`` of the store in which they meet.
        node: name of this node in what is told.
        sizes: what a number of ranks must fit; with `auto`, in a start without a checkpoint.
        auto: what each round may choose; None if the model-parallel sizes stay.
    """

    run: str
    store: str
    node: str
    sizes: Sizes
    auto: Auto | None = None

    @property
    def given_up(self) -> str:
        """The key in the store that is there once the run makes no progress."""
        return f"ucp/{self.run}/given-up"

    @property
    def alternatives(self) -> list[Sizes]:
        """The conditions of which a number of ranks must fit one."""
        return [self.sizes] if self.auto is None else self.auto.alternatives(self.sizes)

    def to_environment(self) -> dict[str, str]:
        """Return the variable, for a worker."""
        return {VARIABLE: TypeAdapter(Job).dump_json(self).decode()}

    @classmethod
    def from_environment(cls) -> Job:
        """Read what `to_environment` has made."""
        return TypeAdapter(cls).validate_json(os.environ[VARIABLE])


@dataclass(frozen=True)
class Place:
    """A worker's place among all that the agents have started in one round.

    Attributes:
        round: name of the round; the agents take another port in each.
        rank: rank, before some are left out.
        ranks: number of ranks, likewise.
        local: rank on this node.
        on_node: number of ranks on this node.
        node: number of this node.
    """

    round: str
    rank: int
    ranks: int
    local: int
    on_node: int
    node: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read the variables that torch's agent has set."""
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"
        return cls(
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", *(int(os.environ[name]) for name in names)
        )

    @property
    def are_there(self) -> str:
        """``3 ranks are there``."""
        return f"{self.ranks} ranks are there" if self.ranks > 1 else "1 rank is there"

    def take(self, ranks: int) -> None:
        """Make this number of ranks the world of this process; the last ones are left out."""
        here = min(self.on_node, ranks - (self.rank - self.local))
        sizes = {"WORLD_SIZE": ranks, "ROLE_WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": here}
        sizes["GROUP_WORLD_SIZE"] = -(-ranks // self.on_node)
        os.environ.update({name: str(size) for name, size in sizes.items()})
