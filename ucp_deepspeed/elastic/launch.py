"""Start torch's elastic agent for one node."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import click

from ucp_deepspeed.elastic import store
from ucp_deepspeed.elastic.job import Job
from ucp_deepspeed.elastic.sizes import Sizes
from ucp_deepspeed.errors import ConfigError, StoreError

RENDEZVOUS = {
    "join_timeout": 86_400,  # seconds that agents wait until there are enough of them: a node may take hours to come back
    "last_call_timeout": 3,  # seconds that the agents wait for more of them, once there are enough
    "keep_alive_interval": 1,  # seconds between two signs of life to one another
    "keep_alive_max_attempt": 3,  # signs that may be missed
    "is_host": 0,  # the store is outside the agents: they outlive the node that had it
}
"""Settings of torch's rendezvous. With torch's own, nodes that are left need 48 s to begin again; with these 14 s."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that an agent passes on to its workers before it ends. SIGUSR1, which schedulers send ahead of time, would kill it by
torch's own list."""

ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it agents keep the master's port of an earlier round when another node gets rank 0, and all wait for ever: in torch
2.13."""


@dataclass(frozen=True)
class Nodes:
    """A range of numbers of nodes, as ``2`` or ``1:4``."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Nodes:
        """Read the range.

        Raises:
            ConfigError: it is none.
        """
        least, _, most = text.partition(":")
        if not all(part.isdecimal() for part in (least, most or least)) or not 0 < int(least) <= int(most or least):
            raise ConfigError(f"--nodes takes a number or a range, such as 4 or 1:4, not {text!r}")
        return cls(int(least), int(most or least))

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"


def agent_arguments(job: Job, nodes: Nodes, on_node: int, restarts: int, script: Sequence[str]) -> list[str]:
    """Return the arguments with which ``torch.distributed.run`` starts the agent of this node.

    Args:
        on_node: number of ranks on each node.
        restarts: number of failures of ranks after which the run ends. Nodes that come and go don't count.
        script: the script and its arguments.
    """
    local = ["--local-addr", "127.0.0.1"] if job.store.startswith("127.0.0.1:") and nodes.most == 1 else []
    return [
        *("--nnodes", str(nodes), "--nproc-per-node", str(on_node), "--max-restarts", str(restarts)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", job.store, "--rdzv-id", job.run),
        *("--signals-to-handle", ",".join(SIGNALS)),
        *("--rdzv-conf", ",".join(f"{key}={value}" for key, value in RENDEZVOUS.items())),
        *local,
        *("-m", "ucp_deepspeed.elastic.worker", *script),
    ]


def run(
    nodes: str,
    on_node: int,
    endpoint: str | None,
    name: str | None,
    node: str | None,
    address: str | None,
    restarts: int,
    batch: int | None,
    tensor: int,
    pipeline: int,
    least: int,
    script: tuple[str, ...],
) -> None:
    """Do what ``ucp run`` says, until the run ends."""
    found = Nodes.parse(nodes)
    sizes = Sizes(batch, tensor, pipeline, least)
    _check(sizes, found, on_node)
    node = node or f"{socket.gethostname()}/{os.getpid()}"
    own, name = endpoint is None, name or "ucp"
    endpoint = endpoint or store.start()
    held = store.connect(endpoint)
    number = store.number_of_run(held, name)
    job = Job(f"{name}.{number}", endpoint, node, sizes)
    store.give_signs_of_life(endpoint, job.given_up)
    _tell(job, found, on_node, own)
    os.environ.update({"UCP_DEEPSPEED": "1", **ENVIRONMENT, **job.to_environment()})
    arguments = agent_arguments(job, found, on_node, restarts, script)
    if address is not None:
        arguments[:0] = ["--local-addr", address]
    status = _run_agent(arguments, endpoint)
    if status is None and not held.check([job.given_up]):
        raise SystemExit(128 + signal.SIGTERM)
    store.end_run(held, name, number)
    raise SystemExit(1 if status is None else status)


def _run_agent(arguments: Sequence[str], endpoint: str) -> int | None:
    """Run an agent until it ends; return the exit status, or None if a signal has ended it: then the run goes on without it.

    Raises:
        StoreError: the store is lost.
    """
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    try:
        torchrun.main(list(arguments))
    except SignalException as error:
        click.echo(f"ucp run: this node leaves the run ({error.sigval.name})", err=True)
        return None
    except ChildFailedError as error:
        click.echo(str(error), err=True)
        return error.get_first_failure()[1].exitcode or 1
    except (RendezvousConnectionError, DistError) as error:
        raise StoreError(
            f"the store at {endpoint} is lost, and so this node ends; start a store with: ucp store --port "
            f"{endpoint.rpartition(':')[2]}; then ucp run on each node: the run goes on from its last checkpoint"
        ) from error
    return 0


def _check(sizes: Sizes, nodes: Nodes, on_node: int) -> None:
    """Raise if no number of nodes of the range has a number of ranks that fits."""
    most = nodes.most * on_node
    if sizes.largest(most) is None:
        divisors = Sizes(sizes.batch, sizes.tensor, sizes.pipeline)
        wanted = [size for size in divisors.up_to((sizes.batch or most) * sizes.tensor * sizes.pipeline)][::-1][:8]
        raise ConfigError(
            f"{sizes} fits no number of ranks up to {most} ({nodes.most} nodes of {on_node}); numbers that work: "
            f"{', '.join(map(str, wanted)) or 'none'}; change --nodes, --nproc-per-node, --tp, --pp, --min-dp or the batch"
        )


def _tell(job: Job, nodes: Nodes, on_node: int, own: bool) -> None:
    most = nodes.most * on_node
    fitting = [*job.sizes.up_to(most)][::-1]
    if len(fitting) < most:
        click.echo(f"ucp run: {job.sizes}: {', '.join(map(str, fitting))} of at most {most} ranks train", err=True)
    if own and nodes.most > 1:
        port = job.store.rpartition(":")[2]
        click.echo(
            f"ucp run: other nodes join with --store {socket.getfqdn()}:{port}; this machine holds the store: if it is lost, all "
            "end; ucp store on a machine of its own is safer",
            err=True,
        )
