"""Checkpoints in Python: metadata, and whole tensors or slices of them, read from the files that hold them.

Needs torch, and neither DeepSpeed nor Megatron-Core. Use it as ``ucp_deepspeed.open_checkpoint``, ``.tags`` and ``.verify``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any, SupportsIndex, TypeAlias

import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError

from ucp_deepspeed import checkpoint as catalogs
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Deferred, Differing, HeldShapes, Kind, Parameter
from ucp_deepspeed.checkpoint.deepspeed.files import ENGINE_KEYS
from ucp_deepspeed.checkpoint.deepspeed.one_save import Place, check_read
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export import left_out
from ucp_deepspeed.checkpoint.export.huggingface import SHARD_SIZE
from ucp_deepspeed.checkpoint.export.weights import DTYPES, Choice, WeightsSource, check_complete
from ucp_deepspeed.checkpoint.opening import warn_of_sums_alone
from ucp_deepspeed.checkpoint.tags import tags_in
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.universal.index import UniversalCheckpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.checkpoint.whole import last_checkpoint
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    MismatchError,
    NotInCheckpointError,
    SpecError,
    UnsupportedError,
    worded,
)
from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.language.resolve import describe
from ucp_deepspeed.layout import Box, Layout, Shape, Topology
from ucp_deepspeed.remote import located
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import FileReader, gather
from ucp_deepspeed.transfer.exporting import Export, Form, check_apart
from ucp_deepspeed.transfer.verification import verify

__all__ = ["OpenCheckpoint", "ParameterInfo", "last_checkpoint", "open_checkpoint", "tags", "verify"]

Index: TypeAlias = "SupportsIndex | slice | EllipsisType | tuple[SupportsIndex | slice | EllipsisType, ...]"
"""An index as in ``tensor[…]``: an integer, a slice, or several of these for the first dimensions, also with an ellipsis."""


_ROWS: TypeAdapter[int | None] = TypeAdapter(PositiveInt | None)


def tags(folder: str | Path) -> list[str]:
    """Return the names of the tags in a folder, of any form. ``open_checkpoint`` takes such a name as ``tag``.

    Raises:
        CheckpointNotFoundError: there is no such folder.
    """
    root = located(folder)
    if not root.is_dir():
        raise CheckpointNotFoundError(f"no folder at {root}")
    return tags_in(root)


def open_checkpoint(
    path: str | Path, tag: str | None = None, spec: str | Path | Spec = "auto", *, vocabulary_size: int | None = None
) -> OpenCheckpoint:
    """Open a checkpoint, native or universal, to look into it. Reads only metadata, and changes nothing on disk.

    Args:
        path: a tag folder, or a folder with tag folders in it.
        tag: name of the tag; by default the one that the ``latest`` file names.
        spec: family or spec file that tells how tensor-parallel ranks have cut the model. ``"auto"`` uses the record in the
            checkpoint, and without a record the names of the parameters.
        vocabulary_size: rows of the vocabulary without padding; by default the recorded number.

    Raises:
        CheckpointNotFoundError: nothing there, or no such tag.
        DamagedCheckpointError: files are missing, truncated or inconsistent.
        UnsupportedError: a form that this release can't read.
        ConfigError: the size of the vocabulary isn't a whole number above 0.
        SpecError, MismatchError: the spec doesn't fit. With ``"auto"`` reading a whole tensor raises this instead.
    """
    rows = _whole_number(vocabulary_size)
    try:
        _ROWS.validate_python(vocabulary_size if rows is None else rows, strict=True)
    except ValidationError as error:
        raise ConfigError(f"vocabulary_size: {worded(error.errors()[0])}") from error
    catalog = catalogs.open_checkpoint(path, None if tag is None else str(tag))
    warn_of_sums_alone(catalog)
    return OpenCheckpoint(catalog, spec, rows)


def _whole_number(value: object) -> int | None:
    """Return a number of any library as Python's; None for all else, such as truth values and arrays, also of one element."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool) and not getattr(value, "ndim", 0):
        with suppress(TypeError):
            return value.__index__()
    return None


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter or buffer.

    Attributes:
        name: its name; a spec may give one that differs from the model's.
        kind: ``trainable``, ``frozen`` or ``buffer``.
        shape: shape of the whole tensor, without padding; None if nothing tells how the ranks have cut it.
        local_shapes: shape of each model-parallel rank's local tensor; None for a pipeline stage without it.
        pattern: how the ranks have cut it, in words; None as for ``shape``.
        states: tensors that can be read → their dtype: ``fp32`` and the optimizer's of a trained parameter, else ``weight``.
        scalars: states that are one number, such as ``step``.
        differing: scalars that differ between partitions, with the value on each.
        refused: states that can't be read, with the reason.
    """

    name: str
    kind: Kind
    shape: Shape | None
    local_shapes: HeldShapes
    pattern: str | None
    states: Mapping[str, torch.dtype]
    scalars: Mapping[str, float]
    differing: Differing
    refused: Mapping[str, str]


class OpenCheckpoint(AbstractContextManager["OpenCheckpoint"]):
    """A checkpoint to look into; made by `open_checkpoint`. A context manager, which closes the files.

    ``docs/python.md`` lists its attributes. ``layouts_unknown`` is the error that keeps whole tensors from being read, or None.
    """

    def __init__(
        self, checkpoint: catalogs.Checkpoint, spec: str | Path | Spec = "auto", vocabulary_size: int | None = None
    ) -> None:
        """See `open_checkpoint`."""
        self._checkpoint = checkpoint
        self._view: UniversalView | None = None
        self.layouts_unknown: SpecError | MismatchError | None = None
        try:
            self._spec = None if spec == "auto" else spec if isinstance(spec, Spec) else load_spec(str(spec))
            self._view = UniversalView.of(checkpoint, self._spec, vocabulary_size)
        except (SpecError, MismatchError) as error:
            if spec != "auto":
                raise
            self.layouts_unknown = error
        self._sums = RecordSums()
        self._compared: set[Place] = set()
        self._reader = FileReader(checkpoint.versions)
        self._checking_reader = FileReader(checkpoint.versions, sums=self._sums)
        self.path, self.form, self.topology = checkpoint.path, checkpoint.form, checkpoint.topology
        source = checkpoint.source if isinstance(checkpoint, UniversalCheckpoint) else self.topology
        self.saved_by = Topology(source.tp, source.pp, source.dp, source.zero_stage, source.ep)
        self.run = checkpoint.run
        held = checkpoint if self._view is None else self._view
        self.parameters = {name: self._info(name, entry) for name, entry in held.parameters.items()}
        self.groups, self.tied = held.groups, held.tied
        self.unrecorded = checkpoint.unrecorded
        self.lacking = None if checkpoint.lacking is None else checkpoint.lacking.heading

    def _info(self, name: str, parameter: Parameter) -> ParameterInfo:
        view = self._view
        return ParameterInfo(
            name,
            parameter.kind,
            None if view is None else view.logical_shape(name),
            parameter.local_shapes,
            None if view is None else describe(view.patterns[name]),
            Deferred(lambda: {state: NAMED_DTYPES[dtype] for state, dtype in parameter.states.items()}),
            parameter.scalars,
            parameter.differing,
            parameter.refused,
        )

    @cached_property
    def client_state(self) -> dict[str, Any]:
        """The ``client_state`` that the script gave to ``save_checkpoint`` on the first rank. See also `unreadable`."""
        _, state = self._checkpoint.client_state()
        return {key: value for key, value in state.items() if key not in ENGINE_KEYS}

    @cached_property
    def unreadable(self) -> Mapping[str, str]:
        """Keys left out of `client_state` because reading them would run code of a class → that class."""
        return self._checkpoint.unreadable()

    def read(self, name: str, state: str | None = None, index: Index = ()) -> torch.Tensor:
        """Read a whole tensor, or a slice of one, to the CPU. Reads only the parts of the files that hold it.

        If whole tensors have been read that are nearly all of a record of an archive, its CRC-32 is compared.

        Args:
            name: name of a parameter or buffer.
            state: one of ``parameters[name].states``; by default ``fp32`` of a trained parameter, and ``weight`` of all others.
            index: as in ``tensor[index]``: ``slice(0, 10)``, ``(slice(None), 3)``, ``numpy.s_[..., :10]``. Steps are positive; a
                slice reads the whole range up to its last element.

        Raises:
            NotInCheckpointError: no such parameter, state or element.
            UnsupportedError: the state is there but can't be read.
            SpecError, MismatchError: nothing tells how the tensor was cut.
            DamagedCheckpointError: a file is missing, truncated or isn't what was saved, or was changed since the checkpoint was
                opened.
            TypeError: the index is of another kind.
        """
        found = self._parameter(name)
        state = self._state(found, state)
        view = self._whole()
        shape = view.logical_shape(found.name)
        box, rest = _boxed(index, shape, found.name)
        flat = torch.empty(box.numel, dtype=found.states[state], device="cpu")
        if box.numel:
            layout = Layout.around(shape, box)
            # Slices can't be checked: the sums of the many that a loop reads would pile up.
            reader = self._checking_reader if box.shape == shape else self._reader
            count = gather(view, found.name, state, 0, flat, reader, layout)
            self._checkpoint.versions.check(count.files)
            check_read(self._checkpoint, count.files, self._compared)
            self._sums.finish()
            reader.finish()
        tensor: torch.Tensor = flat.view(box.shape)[rest]
        return tensor.contiguous()

    def state_dict(self, dtype: torch.dtype | None = None) -> LazyStateDict:
        """Return all weights under all names, read when looked at: what the model computed with.

        Args:
            dtype: type of all floating-point tensors, made of the masters; by default each has the one in which the run computed.

        Raises:
            ConfigError: the dtype is none of float32, bfloat16 and float16.
            SpecError, MismatchError: nothing tells how tensors were cut, or the checkpoint has no value of some.
        """
        view = self._whole()
        check_complete(view)
        wanted = None if dtype is None else next((t for t, n in DTYPES.items() if NAMED_DTYPES[n] == dtype), str(dtype))
        choice, precision = Choice(wanted), view.checkpoint.run.precision
        dtypes = {name: NAMED_DTYPES[choice.dtype_of(entry, precision)] for name, entry in view.parameters.items()}
        return LazyStateDict(self, dtypes | {alias: dtypes[owner] for alias, owner in self.tied.items()})

    def export(
        self,
        destination: str | Path,
        to: Form = "hf",
        *,
        dtype: str | None = None,
        source: WeightsSource | None = None,
        max_shard_size: int | str = SHARD_SIZE,
        config_from: str | Path | None = None,
        on_differing: OnDiffering = "error",
        workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Write the weights to a new folder, in a form that other libraries load; see ``docs/formats.md``.

        Args:
            to: ``hf`` for ``from_pretrained``, ``torch`` for ``torch.load``, ``adapter`` for PEFT.
            dtype: ``fp32``, ``bf16`` or ``fp16``; by default the one in which the run computed.
            source: ``master`` or ``weights``; by default the weights, and with a ``dtype`` the masters, rounded once.
            max_shard_size: most bytes of a file of the form ``hf``, such as ``"5GB"``.
            config_from: folder with the configuration; by default it is searched beside the checkpoint.
            on_differing: the copy to take of a weight that pipeline stages hold with different values.
            progress: called with the bytes that are written, and those to write.

        Returns:
            What the checkpoint holds and the form doesn't keep, in words.

        Raises:
            ConfigError: the folder exists, or a setting is wrong; nothing is written.
            MismatchError, UnsupportedError: the form can't hold the checkpoint's weights; nothing is written.
            SpecError: nothing tells how tensors were cut.
            DamagedCheckpointError, OSError: a file is damaged, or the disk is full; nothing is left behind.
        """
        view, folder = self._whole(), located(destination)
        output = Export(to, dtype, source, max_shard_size, config_from, self._spec, on_differing).output()
        check_apart(self._checkpoint, folder)
        convert(view, folder, output, workers=workers, progress=progress)
        return [*left_out(view), *output.notes(view)]

    def _whole(self) -> UniversalView:
        """Return the view; raise the error that keeps whole tensors from being read."""
        if self._view is None:
            assert self.layouts_unknown is not None
            raise self.layouts_unknown
        return self._view

    def _parameter(self, name: str) -> ParameterInfo:
        found = self.parameters.get(self.tied.get(name, name))
        if found is not None:
            return found
        if name in self.unrecorded:
            raise NotInCheckpointError(f"{self.path} has no value of {name}: {self.unrecorded[name]}")
        near = get_close_matches(str(name), (*self.parameters, *self.tied), n=1)
        hint = f"did you mean {near[0]}?" if near else "the names are in 'parameters'"
        raise NotInCheckpointError(f"{self.path} has no parameter or buffer {name!r}; {hint}")

    def _state(self, parameter: ParameterInfo, state: str | None) -> str:
        if state is None:
            return MASTER if parameter.kind == "trainable" else WEIGHT
        if state in parameter.states:
            return state
        if state in parameter.refused:
            raise UnsupportedError(f"{parameter.name}/{state} can't be read: {parameter.refused[state]}")
        number = f"; {state!r} is a number, in its scalars" if state in parameter.scalars else ""
        why = f"; {self.lacking}" if self.lacking is not None else ""
        raise NotInCheckpointError(
            f"{parameter.name} ({parameter.kind}) has no state {state!r} in {self.path}; it has "
            f"{', '.join(parameter.states)}{number}{why}"
        )

    def close(self) -> None:
        """Close the files that were read. A later `read` opens them again."""
        self._reader.close()
        self._checking_reader.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<OpenCheckpoint {self.path}: {self.form}, {self.topology}, step {self.run.global_steps}, "
            f"{len(self.parameters)} parameters and buffers>"
        )


class LazyStateDict(Mapping[str, torch.Tensor]):
    """A ``state_dict`` whose tensors are read each time they are looked at; made by `OpenCheckpoint.state_dict`.

    ``dtypes`` has the type of each without reading it. ``dict(…)`` reads all.
    """

    def __init__(self, checkpoint: OpenCheckpoint, dtypes: Mapping[str, torch.dtype]) -> None:
        self._checkpoint, self.dtypes = checkpoint, dtypes

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype = self.dtypes[name]
        return self._checkpoint.read(name).to(dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.dtypes

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)

    def __repr__(self) -> str:
        return f"<state_dict of {self._checkpoint!r}>"


def _boxed(index: Index, shape: Shape, name: str) -> tuple[Box, tuple[int | slice, ...]]:
    """Return the box of a tensor that an index needs, and the index into that box."""
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if parts.count(Ellipsis) > 1:
        raise TypeError(f"index {index!r} has several ellipses")
    if (dots := [place for place, part in enumerate(parts) if part is Ellipsis]) and len(parts) <= len(shape) + 1:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise NotInCheckpointError(f"{name} has shape {list(shape)}: an index of {len(parts)} dimensions leaves it")
    bounds: list[tuple[int, int]] = []
    rest: list[int | slice] = []
    for part, extent in zip([*parts, *[slice(None)] * (len(shape) - len(parts))], shape, strict=True):
        if isinstance(part, slice):
            start, stop, step = part.indices(extent)
            if step < 1:
                raise TypeError(f"index {part} has a negative step; read it forwards and call flip() on the tensor")
            bounds.append((start, max(start, stop)))
            rest.append(slice(None, None, step))
        elif (number := _whole_number(part)) is None:
            raise TypeError(
                f"index {part!r} is neither an integer, a slice, an ellipsis nor a tuple of these; read a slice, then pick"
            )
        else:
            if not -extent <= number < extent:
                raise NotInCheckpointError(
                    f"{name} has shape {list(shape)}: index {number} leaves a dimension of {extent}"
                )
            bounds.append((number % extent, number % extent + 1))
            rest.append(0)
    return Box(tuple(low for low, _ in bounds), tuple(high for _, high in bounds)), tuple(rest)
