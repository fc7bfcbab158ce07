"""The universal format as an output: atoms in safetensors files, then tensors of the client state, the index last."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import random_files
from ucp_deepspeed.checkpoint.bounds import check_inside, misshapen
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, Differing, OnUnreadable
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME, FileSums, digest_of_sums, joined, sums_of
from ucp_deepspeed.checkpoint.deepspeed.files import ENGINE_KEYS
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.differing import OnDiffering, made_one
from ucp_deepspeed.checkpoint.encoding import check_encoded, encode, with_sum
from ucp_deepspeed.checkpoint.extra_states import shared_extra_states
from ucp_deepspeed.checkpoint.output import Output, OutputFile, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.safetensors_files import safetensors_file
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES
from ucp_deepspeed.checkpoint.universal.index import (
    CLIENT_TENSORS_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    Index,
    IndexGroup,
    IndexParameter,
    IndexRun,
    IndexSource,
    UniversalCheckpoint,
    are_scalars,
    atom_key,
)
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MAX_LISTED, ConfigError, DamagedCheckpointError, MismatchError, UnsupportedError

DATA_SCHEDULES = ("data_sampler", "random_ltd")
"""DeepSpeed's keys for its curriculum and its random layer-token dropping; None where a run has none."""

KEPT_ENGINE_KEYS = ("ds_config", "ds_version")
"""Keys that DeepSpeed puts beside the user's client state and that have a meaning on another topology."""


@dataclass(frozen=True)
class UniversalOutput(Output):
    """A universal checkpoint; see `Output` and `describe`. ``file_numbytes``: most bytes in a file of several atoms."""

    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"
    file_numbytes: int = tunables.FILE_NUMBYTES

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`, and `describe` for the errors."""
        files = lay_out(view, self.file_numbytes)
        homes = {(region.name, region.state): file.file_name for file in files for region in file.regions}
        index, tensors = describe(view, homes, self.drop_client_state, self.on_unreadable, self.on_differing)
        finish = partial(_write_rest, view, index, tensors)
        return OutputPlan(files, finish, sum(tensor.nbytes for tensor in tensors.values()))


def lay_out(view: UniversalView, file_numbytes: int) -> tuple[OutputFile, ...]:
    """Place all atoms in files, by parameter."""
    bins: list[dict[str, StoredTensor]] = [{}]
    held = 0
    for name, parameter in view.parameters.items():
        for state in parameter.states:
            region = Region.whole(view, name, state)
            if bins[-1] and held + region.numbytes > file_numbytes:
                bins.append({})
                held = 0
            bins[-1][atom_key(name, state)] = StoredTensor.of(region)
            held += region.numbytes
    names = [f"atoms-{number:05d}-of-{len(bins):05d}.safetensors" for number in range(1, len(bins) + 1)]
    return tuple(map(safetensors_file, names, bins))


def _write_rest(
    view: UniversalView, index: Index, tensors: dict[str, torch.Tensor], folder: Path, of_atoms: Sequence[FileSums]
) -> None:
    """Write everything but the atoms. Open the result again: what can't be opened must not be committed."""
    lines, first = [each.line() for each in of_atoms], _first_random_state(view.checkpoint)
    state = None if first is None else first.decode("ascii").rstrip("\n")
    if tensors:
        try:
            safetensors.torch.save_file(tensors, folder / CLIENT_TENSORS_NAME)
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder / CLIENT_TENSORS_NAME} can't be written: {error}") from error
        lines.append(sums_of(folder / CLIENT_TENSORS_NAME).line())
    # The id of this save is made of its content, so that a conversion made again is the same to the byte.
    save_id = digest_of_sums("\n".join([*lines, state or "", index.model_dump_json()]).encode("utf-8"))
    if state is not None:
        path = folder / random_files.RANDOM_STATES_NAME
        path.write_text(random_files.joined([state], save_id), encoding="ascii")
        lines.append(sums_of(path).line())
    sums = joined(save_id, lines)
    (folder / CHECKSUMS_NAME).write_text(sums, encoding="ascii")
    sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir()) if entry.name != MARK_NAME}
    told = {"files": sizes, "save_id": save_id, "checksums": digest_of_sums(sums.encode("ascii"))}
    (folder / INDEX_NAME).write_text(
        with_sum(index.model_copy(update=told).model_dump_json(indent=1)), encoding="utf-8"
    )
    UniversalCheckpoint(folder)


def _first_random_state(checkpoint: Checkpoint) -> bytes | None:
    """Return the first rank's random state as it is in its file; None if there is none that was committed."""
    try:
        listing = random_files.description_of(checkpoint)
        path = random_files.committed_path(checkpoint.path, 0, listing)
        if path is None:
            random_files.warn_of_uncommitted(checkpoint.path, "the conversion holds no random state")
            return None
        checkpoint.versions.note(path)
        check_inside(path)
        first = random_files.read_state(path, 0, None if listing is None else listing.save_id)
        if first is not None:
            random_files.parse_state(first, path, 0)
    except DamagedCheckpointError as error:
        hint = f"remove it, and {MANIFEST_NAME} too if that lists it, and the conversion leaves random states out"
        raise DamagedCheckpointError(f"{error}; {hint}") from error
    return first


def describe(
    view: UniversalView,
    homes: Mapping[tuple[str, str], str],
    drop_client_state: Collection[str] = (),
    on_unreadable: OnUnreadable = "error",
    on_differing: OnDiffering = "error",
) -> tuple[Index, dict[str, torch.Tensor]]:
    """Return the index, still without the sizes of files, and the tensors in the client state, which go to a file of their own.

    Args:
        homes: (parameter, state) → name of the file that will hold the atom.
        drop_client_state: top-level keys of the client state, and keys of extra states, to leave out.
        on_unreadable: the treatment of values that can't be read: see `OnUnreadable`.
        on_differing: the number to write where numbers differ over the partitions.

    Raises:
        MismatchError: the checkpoint holds no optimizer state; or numbers differ over the partitions, and may not become one.
        ConfigError: the client state has no such key.
        UnsupportedError: a value in the client state, a scheduler or a group has no universal form; says where it is.
    """
    checkpoint = view.checkpoint
    if checkpoint.lacking is not None:
        raise checkpoint.lacking
    if on_unreadable == "error" and (unread := left_out(checkpoint, drop_client_state)):
        told = f"{checkpoint.path} can't be read as a whole; --on-unreadable drop converts the rest"
        raise UnsupportedError(told, unread)
    refused = [f"{name}: {why}" for name, parameter in view.parameters.items() for why in parameter.refused.values()]
    if refused:
        told = "\n  ".join([f"{checkpoint.path} can't be converted:", *refused[:MAX_LISTED]])
        raise UnsupportedError(f"{told}\nucp export writes weights alone, without optimizer states")
    scalars, settings = _made_one(view, on_differing)
    values, tensors = _encoded_values(checkpoint, drop_client_state)
    source = IndexSource(form=checkpoint.form, **asdict(checkpoint.topology))
    if isinstance(checkpoint, UniversalCheckpoint):
        source = checkpoint.source
    index = Index(
        format_version=FORMAT_VERSION,
        source=source,
        run=_run(checkpoint),
        vocabulary_size=view.vocabulary_size,
        parameters={
            name: IndexParameter(
                kind=parameter.kind,
                shape=view.logical_shape(name),
                pattern=view.patterns[name],
                states={state: homes[name, state] for state in parameter.states},
                scalars=_encoded_scalars(scalars[name], name),
                may_be_buffer=parameter.may_be_buffer,
            )
            for name, parameter in view.parameters.items()
        },
        groups=tuple(
            IndexGroup(names=group.names, hyperparameters=_encoded(held, f"group {number}"))
            for number, (group, held) in enumerate(zip(view.groups, settings, strict=True))
        ),
        client_state=values["client_state"],
        extra_states=values["extra_states"],
        tied=view.tied,
        files={},
    )
    return index, {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def _made_one(view: UniversalView, how: OnDiffering) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return one value of each parameter's scalars, and of each group's hyper-parameters."""
    problems: dict[str, str] = {}

    def settled(place: str, values: Mapping[str, Any], differing: Differing) -> dict[str, Any]:
        found, refused = made_one(values, differing, how)
        for key, told in refused.items():
            problems.setdefault(f"{key!r} is {told}", place)
        return found

    scalars = {name: settled(name, each.scalars, each.differing) for name, each in view.parameters.items()}
    settings = [
        settled(f"parameter group {number}", group.hyperparameters, group.differing)
        for number, group in enumerate(view.groups)
    ]
    if problems:
        listed = [f"{place}: {told}" for told, place in problems.items()]
        remedy = "--on-differing first, last, mean or max makes one number of them"
        raise MismatchError(f"{view.checkpoint.path} has numbers that differ over its partitions", listed, remedy)
    return scalars, settings


def left_out(checkpoint: Checkpoint, drop_client_state: Collection[str] = ()) -> list[str]:
    """Return what a conversion leaves out because no file holds it, or nobody can read it, each with the reason."""
    classes = {key: kind for key, kind in checkpoint.unreadable().items() if key not in drop_client_state}
    unread = [f"client_state.{key}: it can't be read without running code of {kind}" for key, kind in classes.items()]
    return [f"{name}: {why}" for name, why in checkpoint.unrecorded.items()] + unread


def _without_numpy(value: Any) -> Any:
    """Return a value with plain numbers and lists in place of numpy's, which DeepSpeed's schedules take too."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_numpy(item) for key, item in value.items()}
    return type(value)(map(_without_numpy, value)) if isinstance(value, (list, tuple)) else value


def _run(checkpoint: Checkpoint) -> IndexRun:
    run = {field.name: getattr(checkpoint.run, field.name) for field in fields(checkpoint.run)}
    scale = None if run["loss_scale"] is None else asdict(run["loss_scale"])
    for key, value in (("lr_scheduler", run["lr_scheduler"]), ("loss_scale", scale)):
        if not isinstance(value, Mapping | None):  # readers take nothing else
            kind = type(value).__qualname__
            raise UnsupportedError(f"{key} is a {kind}, which has no universal form; use a mapping")
        run[key] = _encoded(value, key)
    return IndexRun(**run)


def _encoded(value: Any, place: str) -> Any:
    """Encode a value of the index itself, which is only JSON: a tensor in it would have nowhere to go."""
    tensors: dict[str, torch.Tensor] = {}
    encoded = encode(value, place, tensors)
    if tensors:
        raise UnsupportedError(f"{', '.join(tensors)}: a tensor here has no universal form; use a number")
    check_encoded(encoded, place)
    return encoded


def _encoded_scalars(value: Mapping[Any, Any], name: str) -> Any:
    if not are_scalars(value):
        raise UnsupportedError(f"{name} has scalars that are no numbers by name, which have no universal form: {value}")
    return _encoded(dict(value), name)


class _Places(dict[str, torch.Tensor]):
    """Tensors by place. It refuses two at one place, as in ``{"a.b": x, "a": {"b": y}}``: they would overwrite each other."""

    def __setitem__(self, place: str, tensor: torch.Tensor) -> None:
        if place in self:
            raise UnsupportedError(f"{place} stands for two tensors; rename one of the keys with dots")
        if tensor.dtype not in TORCH_DTYPES or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}"
            raise UnsupportedError(f"{place} is a tensor of {kind}, which has no universal form")
        super().__setitem__(place, tensor)


def _encoded_values(checkpoint: Checkpoint, drop: Collection[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return client state and extra states, encoded, and the tensors in them."""
    shared, differing = shared_extra_states(checkpoint.extra_states())
    _, state = checkpoint.client_state()
    client_state = {key: value for key, value in state.items() if key not in ENGINE_KEYS or key in KEPT_ENGINE_KEYS}
    client_state |= {key: _without_numpy(state[key]) for key in DATA_SCHEDULES if state.get(key) is not None}
    held: dict[str, dict[str, Any]] = {"client_state": client_state, "extra_states": shared}
    keys = [*held["client_state"], *shared, *differing]
    unknown = sorted(set(drop) - {str(key) for key in keys} - checkpoint.unreadable().keys())
    if unknown:
        raise ConfigError(f"client state has no key {', '.join(unknown)}; its keys: {', '.join(map(str, keys))}")
    kept = {
        what: {key: value for key, value in values.items() if str(key) not in drop} for what, values in held.items()
    }
    places = _Places()
    problems = {key: f"{key} differs over the tensor-parallel ranks" for key in differing if key not in drop}
    for what, values in kept.items():
        for key, value in values.items():
            try:
                if why := misshapen(value):
                    raise UnsupportedError(f"{what}.{key} has no universal form: {why}")
                check_encoded([str(key), encode(value, f"{what}.{key}", places)], f"{what}.{key}")
            except RecursionError:
                problems[str(key)] = f"{what}.{key} has too many values inside others"
            except UnsupportedError as error:
                problems[str(key)] = str(error)
    if problems:
        fix = " ".join(f"--drop-client-state {key}" for key in problems)
        raise UnsupportedError("\n".join([*problems.values(), f"leave them out with: ucp convert … {fix}"]))
    tensors: dict[str, torch.Tensor] = {}
    return {what: encode(values, what, tensors) for what, values in kept.items()}, tensors
