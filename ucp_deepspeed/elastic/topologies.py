"""The topology of a round where ``--topology auto`` leaves it open: one on which the newest checkpoint can be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.universal.index import UniversalCheckpoint
from ucp_deepspeed.checkpoint.whole import last_checkpoint
from ucp_deepspeed.cli.printing import in_words
from ucp_deepspeed.elastic.sizes import Auto, Sizes, named
from ucp_deepspeed.errors import ConfigError, listed
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.targeting import plan_target


class NothingFitsError(ConfigError):
    """No topology that may be chosen is possible and fits the memory, also if all nodes are there."""


@dataclass(frozen=True)
class Choice:
    """The choice of one rank for all ranks of a round.

    Attributes:
        topology: None if all ranks stand by until more are there.
        reason: what is told of it.
    """

    topology: Topology | None
    reason: str


@dataclass(frozen=True)
class _Look:
    """The answer of a plan for one topology.

    Attributes:
        held: most bytes of weights and states on a rank; None if the checkpoint can't be loaded there.
        told: the same in words.
        fits: whether it can be chosen.
    """

    topology: Topology
    held: int | None
    told: str
    fits: bool


def choose(sizes: Sizes, auto: Auto, ranks: int) -> Choice:
    """Choose the topology for a number of ranks: on as many of them as possible, and there the one that cuts the model least.

    Each pair of model-parallel sizes is planned once or twice. No tensors are read.

    Args:
        sizes: the conditions, with the sizes of a start without a checkpoint.

    Raises:
        NothingFitsError: nothing can be chosen, also on all ranks that there may be; lists what would fit.
        UniversalCheckpointError: the checkpoint can't be read.
    """
    found = last_checkpoint(auto.checkpoint)
    if found is not None:
        return _Search(sizes, auto, open_checkpoint(found)).choose(ranks)
    topology = sizes.topology(ranks)
    told = f"{sizes} fits no number of ranks up to {ranks}" if topology is None else _on(topology, ranks)
    return Choice(topology, f"{told}: there is no whole checkpoint in {auto.checkpoint} yet")


def _on(topology: Topology, ranks: int) -> str:
    some = f" on {topology.world_size} of them" if topology.world_size < ranks else ""
    return f"{named(topology)}{some}"


def _compared(held: int, memory: int | None) -> str:
    """``1.5 GiB of 2.0 GiB``, or ``2.5 GiB, more than 2.0 GiB``; in bytes where the words would be the same."""
    if memory is None:
        return in_words(held)
    words = in_words(held), in_words(memory)
    if words[0] == words[1]:
        words = f"{held:,} B", f"{memory:,} B"
    return (" of " if held <= memory else ", more than ").join(words)


class _Search:
    """Looks at one topology after the other; see `choose`."""

    def __init__(self, sizes: Sizes, auto: Auto, checkpoint: Checkpoint) -> None:
        self._auto, self._checkpoint = auto, checkpoint
        self._alternatives = auto.alternatives(sizes)
        source = checkpoint.source if isinstance(checkpoint, UniversalCheckpoint) else checkpoint.topology
        self._source = Topology(source.tp, source.pp, source.dp, source.zero_stage, source.ep)
        self._hopeless: set[tuple[int, int]] = set()

    def choose(self, ranks: int) -> Choice:
        """Return the choice for a number of ranks."""
        passed: list[_Look] = []
        for topology in self._candidates(ranks):
            look = self._look(topology)
            if look.fits:
                others = "".join(f"; {other.told}" for other in passed)
                return Choice(topology, f"{_on(topology, ranks)}, from {self._checkpoint.path}: {look.told}{others}")
            passed.append(look)
        for sizes in self._alternatives:
            most = sizes.largest(self._auto.ranks) or 0
            if most <= ranks:
                continue
            look = self._look(self._topology(sizes, most))
            if look.fits:
                told = "; ".join(each.told for each in (look, *passed))
                return Choice(None, f"too few for {self._checkpoint.path}, wait for {most}: {told}")
            passed.append(look)
        raise NothingFitsError(self._refusal(passed))

    def _candidates(self, ranks: int) -> Iterator[Topology]:
        """Yield what may be chosen, the best first, but for sizes that were found hopeless meanwhile."""
        for number, sizes in product(range(ranks, 0, -1), self._alternatives):
            if sizes.data_parallel(number) is not None and (sizes.tensor, sizes.pipeline) not in self._hopeless:
                yield self._topology(sizes, number)

    def _topology(self, sizes: Sizes, ranks: int) -> Topology:
        data = ranks // (sizes.tensor * sizes.pipeline)
        return replace(self._source, tp=sizes.tensor, pp=sizes.pipeline, dp=data)

    def _look(self, topology: Topology) -> _Look:
        """Plan one data-parallel rank of each model-parallel one, and of experts: the others hold as much."""
        pair, name = (topology.tp, topology.pp), named(topology)
        plan = plan_target(
            self._checkpoint, topology, only=set(product(range(topology.model_parallel), range(topology.ep)))
        )
        if not plan.possible:
            # Only these may be possible on fewer data-parallel ranks.
            if topology.ep == 1 and pair != (self._source.tp, self._source.pp):
                self._hopeless.add(pair)
            first, *others = plan.obstacles
            more = f" (and {len(others)} more)" if others else ""
            return _Look(topology, None, f"{name} is impossible: {first}{more}", False)
        held, memory = max(rank.bytes_held + rank.bytes_of_weights for rank in plan.ranks), self._auto.memory
        fits = memory is None or held <= memory
        if not fits:  # fewer data-parallel ranks hold no less
            self._hopeless.add(pair)
        return _Look(topology, held, f"{name} holds {_compared(held, memory)} per rank", fits)

    def _refusal(self, passed: list[_Look]) -> str:
        lines = listed([look.told for look in passed])
        able = min((look for look in passed if look.held is not None), key=lambda look: look.held or 0, default=None)
        least = (
            "" if able is None else f"--memory-per-rank {-(-(able.held or 0) // 2**20)}MiB for {named(able.topology)}, "
        )
        return "\n".join(
            [
                f"--topology auto finds no topology for {self._checkpoint.path} on up to {self._auto.ranks} ranks:",
                *(lines or ["  no size fits the number of ranks"]),
                f"What would do: {least}more --nodes, or other --tp and --pp",
            ]
        )
