"""The rounds of a run: which nodes train in each, and one line that tells how the run went on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import wrapt
from torch.distributed import DistError

from ucp_deepspeed.elastic.job import Job, Place

COME_SECONDS = 60.0
"""Seconds that a node may take to tell its name, after the first has begun its first step."""


MOST_FRUITLESS = 5
"""Rounds that may end before their first step, one after the other: in one more, a script's fault would be met again."""


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
    """

    step: int
    when: float
    nodes: tuple[str, ...]
    ranks: int
    parallel: str
    number: int

    @classmethod
    def from_json(cls, text: str) -> Stood:
        """Read what ``json.dumps`` has made of its fields."""
        fields = json.loads(text)
        return cls(**fields | {"nodes": tuple(fields["nodes"])})


def told(before: Stood, now: Stood) -> str:
    """Return the line that tells of a new round, after its first step."""
    left = [node for node in before.nodes if node not in now.nodes]
    came = [node for node in now.nodes if node not in before.nodes]
    changes = [f"{', '.join(nodes)} {verb}" for nodes, verb in ((left, "left"), (came, "joined")) if nodes]
    repeated = before.step - (now.step - 1)
    nodes = " and ".join(changes) or "the same nodes"
    return (
        f"round {now.number}: {nodes}; {before.parallel} → {now.parallel}; goes on from step {now.step - 1}, "
        f"{repeated} step{'s' * (repeated != 1)} repeated; {now.when - before.when:.1f} s from the last step to this"
    )


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

    @property
    def ended(self) -> str:
        """The key in the store that counts the ranks whose script has ended well."""
        return f"{self._key}/ended"

    def come(self) -> None:
        """Tell the node's name, once on each node."""
        if self._place.local == 0:
            self._store.set(f"{self._key}/node{self._place.node}", self._job.node)

    def watch(self, ranks: int) -> None:
        """Tell of the round after its first step, and keep where the run stands after each. For rank 0."""
        self._ranks = ranks
        if self._store.add(self._fruitless, 1) > MOST_FRUITLESS:
            print(
                f"ucp run: {MOST_FRUITLESS} rounds in a row have ended before their first step; the run ends: see their errors",
                file=sys.stderr,
                flush=True,
            )
            self._store.set(self._job.given_up, "")
            raise SystemExit(1)
        wrapt.register_post_import_hook(self._wrap, "deepspeed.runtime.engine")

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
            self._store.set(self._fruitless, "0")
            before = Stood.from_json(self._store.get(self._last).decode()) if self._store.check([self._last]) else None
            number, nodes = (1 if before is None else before.number + 1), self._nodes()
            self._stood = Stood(engine.global_steps, time.time(), nodes, self._ranks, _parallel(engine), number)
            if before is not None:
                print(f"ucp run: {told(before, self._stood)}", file=sys.stderr, flush=True)
        else:
            self._stood = replace(self._stood, step=engine.global_steps, when=time.time())
        self._store.set(self._last, json.dumps(asdict(self._stood)))

    def _nodes(self) -> tuple[str, ...]:
        """Wait for the names of the nodes that train."""
        number = -(-self._ranks // self._place.on_node)
        keys = [f"{self._key}/node{node}" for node in range(number)]
        self._store.wait(keys, timedelta(seconds=COME_SECONDS))
        return tuple(self._store.get(key).decode() for key in keys)


def _parallel(engine: Any) -> str:
    """Return the topology of an engine, as ``TP2·PP1·DP4``."""
    stages, data = getattr(engine, "num_stages", 1), engine.dp_world_size
    return f"TP{engine.world_size // stages // data}·PP{stages}·DP{data}"
