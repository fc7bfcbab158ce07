"""The rounds of a run: which nodes train in each, and one line that tells how the run went on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import wrapt
from torch.distributed import DistError

from ucp_deepspeed.elastic.job import Job, Place
from ucp_deepspeed.elastic.sizes import Auto, named
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.layout import Topology

COME_SECONDS = 60.0
"""Seconds that a node may take to tell its name, after the first has begun its first step."""

LOOK_SECONDS = 0.1
"""Seconds between two looks of a rank that waits for the topology."""

MOST_FRUITLESS = 5
"""Rounds that may come no further than the one before, on the same nodes: in one more, a script's fault would be met again."""


@dataclass(frozen=True)
class Stood:
    """The state of the run after a step.

    Attributes:
        step: number of steps done.
        when: seconds since the epoch.
        nodes: names of the nodes.
        ranks: number of ranks that train.
        parallel: their topology.
        number: number of the round, from 1.
        standing: names of the nodes that stand by.
    """

    step: int
    when: float
    nodes: tuple[str, ...]
    ranks: int
    parallel: str
    number: int
    standing: tuple[str, ...] = ()

    @property
    def there(self) -> tuple[str, ...]:
        """Names of all nodes."""
        return self.nodes + self.standing

    @classmethod
    def from_json(cls, text: str) -> Stood:
        """Read what ``json.dumps`` has made of its fields."""
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in ("nodes", "standing")})


def told(before: Stood, now: Stood) -> str:
    """Return the line that tells of a new round, after its first step."""
    left = [node for node in before.there if node not in now.there]
    came = [node for node in now.there if node not in before.there]
    idle = [node for node in now.standing if node in before.nodes]
    verbs = (left, "left"), (came, "joined"), (idle, "stands by" if len(idle) == 1 else "stand by")
    changes = [f"{', '.join(nodes)} {verb}" for nodes, verb in verbs if nodes]
    repeated = before.step - (now.step - 1)
    nodes = " and ".join(changes) or "the same nodes"
    return (
        f"round {now.number}: {nodes}; {before.parallel} → {now.parallel}; goes on from step {now.step - 1}, "
        f"{repeated} step{'s' * (repeated != 1)} repeated; {now.when - before.when:.1f} s from the last step to this"
    )


def tell(text: str) -> None:
    """Tell something of the run to whoever reads the logs."""
    print(f"ucp run: {text}", file=sys.stderr, flush=True)


class Round:
    """A round, as a worker knows it.

    Args:
        store: the store in which the agents meet.
    """

    def __init__(self, job: Job, place: Place, store: Any) -> None:
        self._job, self._place, self._store = job, place, store
        self._last, self._key = f"ucp/{job.run}/last", f"ucp/{job.run}/{place.round}"
        self._fruitless = f"ucp/{job.run}/fruitless"
        self._ranks = 0
        self._stood: Stood | None = None
        self._reached: int | None = (
            None  # the last step of a round before on the same nodes, until this one is beyond it
        )

    @property
    def ended(self) -> str:
        """The key in the store that counts the ranks whose script has ended well."""
        return f"{self._key}/ended"

    def come(self) -> None:
        """Tell the node's name, once on each node."""
        if self._place.local == 0:
            self._store.set(f"{self._key}/node{self._place.node}", self._job.node)

    def choose(self) -> Topology | None:
        """Return the topology on which the round trains, alike on all ranks; None if all stand by until more are there."""
        if self._job.auto is None:
            return self._job.sizes.topology(self._place.ranks)
        key = f"{self._key}/topology"
        if self._place.rank == 0:
            self._forget_last(key)
            self._store.set(key, json.dumps(self._chosen(self._job.auto)))
        while not self._store.check([key]):  # within a store's own wait no signal would be noticed
            time.sleep(LOOK_SECONDS)
        chosen = json.loads(self._store.get(key))
        return None if chosen is None else Topology(**chosen)

    def _forget_last(self, key: str) -> None:
        """Remove the topology of the round before: some later round may have its port again, and so its key."""
        last = f"ucp/{self._job.run}/last-topology"
        if self._store.check([last]):
            self._store.delete_key(self._store.get(last).decode())
        self._store.set(last, key)

    def _chosen(self, auto: Auto) -> dict[str, int] | None:
        """Choose and tell."""
        from ucp_deepspeed.elastic.topologies import NothingFitsError, choose

        try:
            choice = choose(self._job.sizes, auto, self._place.ranks)
        except NothingFitsError as error:
            self.give_up(str(error))
        except (UniversalCheckpointError, OSError) as error:
            tell(f"--topology auto: {error}")
            self._count()
            raise SystemExit(1) from None
        tell(f"{self._place.are_there}; {choice.reason}")
        return None if choice.topology is None else asdict(choice.topology)

    def watch(self, ranks: int) -> None:
        """Tell of the round after its first step, and keep where the run stands after each. For rank 0."""
        self._ranks = ranks
        self._count()
        wrapt.register_post_import_hook(self._wrap, "deepspeed.runtime.engine")

    def _count(self) -> None:
        """Count the round as one that comes no further; end the run if there are too many."""
        if self._store.add(self._fruitless, 1) > MOST_FRUITLESS:
            self.give_up(f"{MOST_FRUITLESS} rounds in a row came no further; the run ends: see their errors")

    def give_up(self, reason: str) -> NoReturn:
        """End the run, and tell why, once for all ranks."""
        if self._store.add(f"ucp/{self._job.run}/told", 1) == 1:
            tell(reason)
        self._store.set(self._job.given_up, "")
        raise SystemExit(1)

    def _wrap(self, module: Any) -> None:
        wrapt.wrap_function_wrapper(module, "DeepSpeedEngine._take_model_step", self._stepped)

    def _stepped(self, wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = wrapped(*args, **kwargs)
        with suppress(DistError):  # without its store the agent ends, and sends a signal: the run can save on it
            self._tell(engine)
        return result

    def _tell(self, engine: Any) -> None:
        """Tell of the round if this is its first step, and keep where the run stands."""
        if self._stood is None:
            before = Stood.from_json(self._store.get(self._last).decode()) if self._store.check([self._last]) else None
            number, (nodes, standing) = (1 if before is None else before.number + 1), self._nodes()
            parallel = _parallel(engine)
            self._stood = Stood(engine.global_steps, time.time(), nodes, self._ranks, parallel, number, standing)
            if before is not None:
                tell(told(before, self._stood))
            self._reached = before.step if before is not None and before.there == self._stood.there else -1
        else:
            self._stood = replace(self._stood, step=engine.global_steps, when=time.time())
        if self._reached is not None and self._stood.step > self._reached:
            self._store.set(self._fruitless, "0")
            self._reached = None
        self._store.set(self._last, json.dumps(asdict(self._stood)))

    def _nodes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Wait for the names of the nodes that train; return them, and those of the others that have come."""
        training, there = (-(-ranks // self._place.on_node) for ranks in (self._ranks, self._place.ranks))
        keys = [f"{self._key}/node{node}" for node in range(there)]
        self._store.wait(keys[:training], timedelta(seconds=COME_SECONDS))
        standing = [key for key in keys[training:] if self._store.check([key])]
        return self._told(keys[:training]), self._told(standing)

    def _told(self, keys: list[str]) -> tuple[str, ...]:
        return tuple(self._store.get(key).decode() for key in keys)


def _parallel(engine: Any) -> str:
    """Return the topology of an engine, as ``TP2·PP1·DP4``."""
    stages, data = getattr(engine, "num_stages", 1), engine.dp_world_size
    return named(Topology(engine.world_size // stages // data, stages, data))
