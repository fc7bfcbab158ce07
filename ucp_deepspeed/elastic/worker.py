"""A rank of ``ucp run``, as its agent starts it: it takes its place in the round, and runs the script or stands by."""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn

from ucp_deepspeed import run
from ucp_deepspeed.elastic import store as stores
from ucp_deepspeed.elastic.job import Job, Place
from ucp_deepspeed.elastic.rounds import Round, tell
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.layout import Topology

USAGE = 2
"""Exit status with which scripts refuse their arguments: all rounds would end like that."""

STAND_BY_SECONDS = 0.5
"""Seconds between two looks of a rank that stands by at whether the others have ended."""


def main() -> None:
    """Run the script that the arguments name, if this rank is one of those that train."""
    job, place = Job.from_environment(), Place.from_environment()
    store = stores.connect(job.store)
    if store.check([job.given_up]):
        raise SystemExit(1)
    current = Round(job, place, store)
    current.come()
    topology = current.choose()
    ranks = 0 if topology is None else topology.world_size
    if topology is None or place.rank >= ranks:
        _stand_by(job, place, store, current.ended, ranks)
    place.take(ranks)
    sys.argv[1:] = [_filled(word, topology) for word in sys.argv[1:]]
    if place.rank == 0:
        current.watch(ranks)
    try:
        run.main()
    except ConfigError as error:  # each round would meet it
        current.give_up(str(error))
    except SystemExit as end:
        if end.code == USAGE:
            current.give_up(
                f"the script ended with status {USAGE}: its arguments are wrong; correct them, and start the run again"
            )
        if end.code or _was_told_to_go():
            raise
    store.add(current.ended, 1)


def _was_told_to_go() -> bool:
    """Return whether the script has ended because of a signal: it isn't at its end then."""
    preemption = sys.modules.get("ucp_deepspeed.engine.saving.preemption")
    return preemption is not None and bool(preemption.is_told())


def _filled(word: str, topology: Topology) -> str:
    """Fill the sizes of this round into an argument of the script: ``{tp}``, ``{pp}``, ``{dp}``."""
    for name in ("tp", "pp", "dp"):
        word = word.replace(f"{{{name}}}", str(getattr(topology, name)))
    return word


def _stand_by(job: Job, place: Place, store: Any, ended: str, ranks: int) -> NoReturn:
    """Wait until the ranks that train have ended; the agent ends this one when the nodes change."""
    if place.rank == ranks:
        left = f"ranks {ranks} to {place.ranks - 1} stand by" if ranks < place.ranks - 1 else f"rank {ranks} stands by"
        tell(left if job.auto else f"{place.are_there}; {job.sizes}: {left}")
    while ranks == 0 or store.add(ended, 0) < ranks:
        time.sleep(STAND_BY_SECONDS)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
