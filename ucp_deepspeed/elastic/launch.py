"""Start torch's elastic agent for one node."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from ucp_deepspeed.elastic import store
from ucp_deepspeed.elastic.job import Job
from ucp_deepspeed.elastic.sizes import Auto, Range, Sizes
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


def agent_arguments(job: Job, nodes: Range, on_node: int, restarts: int, script: Sequence[str]) -> list[str]:
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
        *("-m", "--", "ucp_deepspeed.elastic.worker", *script),  # else a script's --log would be taken for --log-dir
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
    tensor: str,
    pipeline: str,
    least: int,
    topology: str,
    checkpoint: Path | None,
    memory: str | None,
    script: tuple[str, ...],
) -> None:
    """Do what ``ucp run`` says, until the run ends."""
    found = Range.parse("--nodes", nodes)
    ranges = _parse_sizes("--tp", tensor, topology), _parse_sizes("--pp", pipeline, topology)
    sizes = Sizes(batch, ranges[0].most, ranges[1].most, least)
    _check(sizes, found, on_node)
    auto = None
    if topology == "auto":
        auto = _auto(ranges, checkpoint, memory, found.most * on_node, script)
    elif checkpoint is not None or memory is not None:
        raise ConfigError("--checkpoint and --memory-per-rank need --topology auto")
    _check_start(endpoint, script)
    node = node or f"{socket.gethostname()}/{os.getpid()}"
    own, name = endpoint is None, name or "ucp"
    endpoint = endpoint or store.start()
    held = store.connect(endpoint)
    number = store.number_of_run(held, name)
    job = Job(f"{name}.{number}", endpoint, node, sizes, auto)
    agree(held, job, on_node)
    store.give_signs_of_life(endpoint, job.given_up)
    _tell(job, found, on_node, own)
    os.environ.update({"UCP_DEEPSPEED": "1", **ENVIRONMENT, **job.to_environment()})
    arguments = agent_arguments(job, found, on_node, restarts, script)
    if address is not None:
        arguments[:0] = ["--local-addr", address]
    status = _run_agent(arguments, endpoint)
    if status < 0 and not held.check([job.given_up]):  # the run goes on without this node
        click.echo(f"ucp run: this node leaves the run ({signal.Signals(-status).name})", err=True)
        raise SystemExit(128 - status)
    store.end_run(held, name, number)
    raise SystemExit(1 if status < 0 else status)


def _run_agent(arguments: Sequence[str], endpoint: str) -> int:
    """Run an agent until it ends; return the exit status, or the negative number of the signal that has ended it.

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
        return -int(error.sigval)
    except ChildFailedError as error:
        click.echo(str(error), err=True)
        return error.get_first_failure()[1].exitcode or 1
    except (RendezvousConnectionError, DistError) as error:
        raise StoreError(
            f"the store at {endpoint} is lost, and so this node ends; start a store with: ucp store --port "
            f"{endpoint.rpartition(':')[2]}; then ucp run on each node: the run goes on from its last checkpoint"
        ) from error
    return 0


def _parse_sizes(option: str, text: str, topology: str) -> Range:
    """Read a model-parallel size, or with ``--topology auto`` the largest one, or a range."""
    sizes = Range.parse(option, text)
    if ":" in text and topology != "auto":
        raise ConfigError(f"{option} {text} is a range, which needs --topology auto; give one number")
    return sizes if ":" in text or topology != "auto" else Range(1, sizes.most)


def _auto(
    ranges: tuple[Range, Range], checkpoint: Path | None, memory: str | None, ranks: int, script: Sequence[str]
) -> Auto:
    """Return what ``--topology auto`` may choose from."""
    if checkpoint is None:
        raise ConfigError("--topology auto needs --checkpoint, the folder in which the script saves")
    tensor, pipeline = (each.divisors for each in ranges)
    for name, sizes in (("tp", tensor), ("pp", pipeline)):
        if len(sizes) > 1 and not any(f"{{{name}}}" in word for word in script):
            raise ConfigError(
                f"--topology auto may choose --{name} {', '.join(map(str, sizes))}, and the script isn't told which: give it "
                f"{{{name}}} as an argument, or --{name} {sizes[-1]}:{sizes[-1]}"
            )
    try:
        numbytes = None if memory is None else int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError as error:
        raise ConfigError(f"--memory-per-rank takes a size such as 80GB or 74.5GiB, not {memory!r}") from error
    return Auto(str(checkpoint), numbytes, tensor, pipeline, ranks)


def _check_start(endpoint: str | None, script: Sequence[str]) -> None:
    """Raise if the ranks would fail at once, in one round after the other, or if the store's name is none."""
    host, _, port = (endpoint or "localhost:0").rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ConfigError(
            f"--store takes HOST:PORT, such as host0:29400, not {endpoint!r}; start one with: ucp store --port 29400"
        )
    if script[0] != "-m" and not Path(script[0]).is_file():
        raise ConfigError(
            f"there is no script {script[0]}, seen from {Path.cwd()}; give its path on this node, or a module after -- -m"
        )


def agree(held: Any, job: Job, on_node: int) -> None:
    """Raise if a node of this run was started with other sizes: each would choose other ranks, and all would wait for ever.

    Args:
        held: the store.
        on_node: number of ranks on each node.

    Raises:
        ConfigError: the sizes differ.
    """
    auto = "" if job.auto is None else f", --topology auto with {asdict(job.auto)}"
    own = f"{job.sizes}, {on_node} ranks on each node{auto}"
    others = held.compare_set(f"ucp/{job.run}/sizes", "", own).decode()
    if others != own:
        raise ConfigError(
            f"this node was started with {own}, and the run in {job.store} with {others}: give all nodes the same options, or, "
            "for another run in this store, --run-id NAME"
        )


def _check(sizes: Sizes, nodes: Range, on_node: int) -> None:
    """Raise if no number of nodes of the range has a number of ranks that fits."""
    most = nodes.most * on_node
    if sizes.largest(most) is None:
        divisors = Sizes(sizes.batch, sizes.tensor, sizes.pipeline)
        wanted = [size for size in divisors.up_to((sizes.batch or most) * sizes.tensor * sizes.pipeline)][::-1][:8]
        raise ConfigError(
            f"{sizes} fits no number of ranks up to {most} ({nodes.most} nodes of {on_node}); numbers that work: "
            f"{', '.join(map(str, wanted)) or 'none'}; change --nodes, --nproc-per-node, --tp, --pp, --min-dp or the batch"
        )


def _tell(job: Job, nodes: Range, on_node: int, own: bool) -> None:
    most = nodes.most * on_node
    fitting = sorted({ranks for sizes in job.alternatives for ranks in sizes.up_to(most)})
    if len(fitting) < most:
        what = "--topology auto" if job.auto else job.sizes
        click.echo(f"ucp run: {what}: {', '.join(map(str, fitting))} of at most {most} ranks train", err=True)
    if own and nodes.most > 1:
        port = job.store.rpartition(":")[2]
        click.echo(
            f"ucp run: other nodes join with --store {socket.getfqdn()}:{port}; this machine holds the store: if it is lost, all "
            "end; ucp store on a machine of its own is safer",
            err=True,
        )
