"""``ucp convert``: any checkpoint → one of another form on disk, such as the universal one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import click

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.bounds import check_inside
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.opening import LATEST_NAME, UNIVERSAL_LATEST_NAME, read_latest, warn_of_sums_alone
from ucp_deepspeed.checkpoint.output import Output
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput, left_out
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME, home_of
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli.printing import echo, in_words
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.errors import ConfigError, MismatchError, UniversalCheckpointError, naming
from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.remote import is_taken, lies_in
from ucp_deepspeed.transfer.commit import write_atomically
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.processes import Ranks

Form = Literal["universal", "dcp", "deepspeed", "deepspeed-universal", "torch_dist"]
"""Forms to write, as ``--to`` names them."""


def write(
    source: Path,
    destination: Path,
    to: Form,
    tag: str | None,
    spec: str | None,
    vocabulary_size: int | None,
    workers: int,
    drop_client_state: tuple[str, ...],
    on_unreadable: OnUnreadable,
    on_differing: OnDiffering,
    quiet: bool,
    **engine: Any,
) -> None:
    """Do what ``ucp convert`` says, with the ranks that the context's object joins; else alone.

    Args: engine: the options that describe the engine which is to load DeepSpeed's own files.
    """
    started = time.monotonic()
    target, named = _target(to, **engine), None if spec is None else load_spec(spec)
    join = click.get_current_context().obj
    with join() if join else nullcontext(Ranks()) as ranks:
        checkpoint = open_checkpoint(source, tag)
        if checkpoint.lacking is not None:
            way_on = "ucp convert writes what a run resumes from; ucp export writes the weights alone"
            raise MismatchError(checkpoint.lacking.heading, checkpoint.lacking.problems, way_on)
        if ranks.rank == 0:
            warn_of_sums_alone(checkpoint)
        folder = destination / _tag(source, checkpoint.path)
        latest = UNIVERSAL_LATEST_NAME if to == "deepspeed-universal" else LATEST_NAME
        _check_free(destination / latest, folder, checkpoint.path)
        for path in sorted(checkpoint.path.iterdir()):
            check_inside(path)
        kept = {"drop_client_state": drop_client_state, "on_unreadable": on_unreadable, "on_differing": on_differing}
        output = _output(to)(**kept, **target, **_named(to, named))
        view = UniversalView.of(checkpoint, named, vocabulary_size, engine["tp"])
        for note in output.notes(view) if ranks.rank == 0 else ():
            echo(note, err=True)
        with shown_progress("convert", quiet or ranks.rank != 0) as progress:
            count = convert(
                view,
                folder,
                output,
                workers=workers,
                progress=progress,
                ranks=ranks,
                then=lambda: _point_to(destination / latest, folder, checkpoint.run.global_steps),
            )
    if ranks.rank != 0:
        return
    for entry in left_out(checkpoint, drop_client_state):
        echo(f"left out {entry}", err=True)
    if not quiet:
        sizes = [entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()]
        echo(
            f"{folder}: read {in_words(count.bytes_read)} from {len(count.files)} files, wrote {in_words(sum(sizes))} "
            f"to {len(sizes)} files in {time.monotonic() - started:.1f} s"
        )


def _output(to: Form) -> Callable[..., Output]:
    """Return the class of a form's output. torch's own takes a moment to import."""
    if to == "universal":
        return UniversalOutput
    if to == "dcp":
        from ucp_deepspeed.checkpoint.dcp.output import DcpOutput

        return DcpOutput
    if to == "torch_dist":
        from ucp_deepspeed.checkpoint.torch_dist.output import TorchDistOutput

        return TorchDistOutput
    if to == "deepspeed-universal":
        from ucp_deepspeed.checkpoint.deepspeed.consolidated_output import ConsolidatedOutput

        return ConsolidatedOutput
    from ucp_deepspeed.transfer.native.output import NativeOutput

    return NativeOutput


def _named(to: Form, spec: Spec | None) -> dict[str, Any]:
    """Return the settings of an output that follow from the spec that the user named."""
    found: dict[str, dict[str, Any]] = {"deepspeed": {"spec": spec}, "deepspeed-universal": {"own_names": spec is None}}
    return found.get(to, {})


def _target(
    to: Form, dp: int | None, zero: int | None, config: Path | None, layers: tuple[int, ...] | None, **sizes: int
) -> dict[str, Any]:
    """Return the settings of an output that describe the engine which is to load it.

    Raises:
        ConfigError: options are missing, or are of no use; or the config isn't one.
    """
    if to == "deepspeed-universal" and zero is not None:
        if zero == 0:
            raise ConfigError("DeepSpeed loads its universal folder at ZeRO stages 1 to 3; leave --zero 0 out")
        return {**_target(to, dp, None, config, layers, **sizes), "bare": zero == 3}
    if to != "deepspeed":
        if (dp, zero, config, layers) != (None,) * 4 or set(sizes.values()) != {1}:
            raise ConfigError(
                f"--tp, --pp, --dp, --ep, --zero, --layers and --config are for --to deepspeed; the form {to} has no topology"
            )
        return {}
    if dp is None or zero is None:
        raise ConfigError("--to deepspeed needs the sizes of the engine that is to load: at least --dp and --zero")
    return {
        "topology": Topology(dp=dp, zero_stage=zero, **sizes),
        "config": None if config is None else _config(config),
        "layers": layers,
    }


def _config(path: Path) -> dict[str, Any]:
    try:
        with naming(path):
            found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} isn't JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object, as a DeepSpeed config is")
    return found


def _check_free(latest: Path, folder: Path, source: Path) -> None:
    """Check that nothing is in the way of the folder, and of the file that is to name it."""
    destination = latest.parent
    if lies_in(destination, source):
        raise ConfigError(f"{destination} lies in the checkpoint that is read; name a folder outside it")
    if latest.is_dir():
        raise ConfigError(f"{latest} is a folder, where a file is to name the tag; nothing was written")
    if not is_taken(folder):
        return
    hint = ""
    if (folder / INDEX_NAME).is_file() and not latest.exists():  # killed between the two
        tag = folder.relative_to(destination).as_posix()
        hint = f". It is whole, and {latest} is missing: load it by its tag, {tag!r}, or write that name into the file"
    raise ConfigError(f"{folder} exists already; nothing was written{hint}")


def _point_to(latest: Path, folder: Path, step: int) -> None:
    """Have ``latest`` name a new tag folder, unless it names one of a later step."""
    with suppress(UniversalCheckpointError, OSError):
        current = open_checkpoint(latest.parent, read_latest(latest))
        if current.run.global_steps > step:
            tag = _tag(latest.parent, current.path).as_posix()
            echo(f"{latest} still names {tag}, which is of a later step", err=True)
            return
    write_atomically(latest, folder.relative_to(latest.parent).as_posix())


def _tag(source: Path, folder: Path) -> Path:
    """A tag, which may have slashes in it, or the name of a tag folder that the user named: ``.``, ``..``, or a link's own."""
    folder = home_of(folder)
    if folder != source and folder.is_relative_to(source) and ".." not in folder.relative_to(source).parts:
        return folder.relative_to(source)
    return Path(folder.name if folder.name not in ("", "..") else folder.resolve().name)
