"""The interface of all outputs of a conversion, as `Checkpoint` is that of all inputs: which bytes go where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path

from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.torch_files.records import Run
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.layout import Layout, Shape


@dataclass(frozen=True, slots=True)
class Region:
    """Consecutive elements of one state of one parameter in a file: of the whole tensor, of a box of it, or of a rank's share.

    Attributes:
        name: logical name of the parameter.
        dtype: type in the file; values of another are converted. A key of `ucp_deepspeed.dtypes.ITEMSIZE`.
        layout: where the parameter's elements lie in local tensors: `Layout.whole` or `Layout.around`, or a layout of a topology.
        rank: the local tensor whose elements, in row-major order, are written. Its padding becomes zero.
        local_start: the first of them.
        file_offset: place of the first byte in the file; a multiple of the type's size.
        transposed: the local tensor is a matrix, and its columns are written one after another: ``local_start`` counts so too.
    """

    name: str
    state: str
    dtype: str
    layout: Layout
    rank: int
    local_start: int
    numel: int
    file_offset: int = 0
    transposed: bool = False

    @classmethod
    def whole(cls, view: UniversalView, name: str, state: str, dtype: str | None = None) -> Region:
        """Make the region of a whole tensor, by default in the type that the checkpoint has."""
        shape = view.logical_shape(name)
        dtype = dtype or view.parameters[name].states[state]
        return cls(name, state, dtype, Layout.whole(shape), 0, 0, prod(shape))

    @property
    def numbytes(self) -> int:
        """Size in the file."""
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def key(self) -> tuple[object, ...]:
        """Its fields but for the place, in brief: equal for equal content."""
        shape, held = self.layout.logical_shape, self.layout.locals[self.rank]
        return self.name, self.state, self.dtype, shape, held, self.local_start, self.numel, self.transposed

    @property
    def is_padded(self) -> bool:
        """Return whether its local tensor has elements that are the parameter's nowhere."""
        local = self.layout.locals[self.rank]
        return sum(piece.local_box.numel for piece in local.pieces) < prod(local.shape)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: regions of one type, wherever in the file. Elements of no region are zero.

    Attributes:
        starts: position of each region in the tensor, in elements. By default they lie end to end, and fill it.
        dtype: type in the file; by default that of the regions.
    """

    shape: Shape
    regions: tuple[Region, ...]
    starts: tuple[int, ...] | None = None
    dtype: str = ""

    def __post_init__(self) -> None:
        if not self.dtype:
            object.__setattr__(self, "dtype", self.regions[0].dtype)
        stops = list(accumulate((region.numel for region in self.regions), initial=0))
        if self.starts is None:
            object.__setattr__(self, "starts", tuple(stops[:-1]))
            assert stops[-1] == prod(self.shape)
        ends = [start + region.numel for start, region in self.placed_regions]
        assert {region.dtype for region in self.regions} <= {self.dtype}
        assert all(
            end <= start for end, start in zip([0, *ends], [*(self.starts or ()), prod(self.shape)], strict=True)
        )

    @classmethod
    def of(cls, region: Region) -> StoredTensor:
        """Make the tensor of a region that is a whole local tensor."""
        shape = region.layout.locals[region.rank].shape
        return cls(shape[::-1] if region.transposed else shape, (region,))

    @property
    def placed_regions(self) -> Iterator[tuple[int, Region]]:
        """The regions, each with its position in the tensor, in elements."""
        assert self.starts is not None
        return zip(self.starts, self.regions, strict=True)

    @property
    def numbytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def placed(self, file_offset: int) -> tuple[Region, ...]:
        """Return the regions at their places in a file, if the tensor begins at this byte."""
        size = ITEMSIZE[self.dtype]
        return tuple(replace(region, file_offset=file_offset + start * size) for start, region in self.placed_regions)


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes that are known before any are read, such as a header."""

    data: bytes
    file_offset: int = 0

    @property
    def numbytes(self) -> int:
        """Size in the file."""
        return len(self.data)


@dataclass(frozen=True)
class OutputFile:
    """A file, by its path in the folder. Its parts are in order of their place; bytes outside them are zero.

    ``records`` are ranges (first byte, byte behind it) whose CRC-32 is taken as they are written, for `OutputPlan`.
    """

    file_name: str
    numbytes: int
    parts: tuple[Region | Literal, ...]
    records: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        starts = (*(part.file_offset for part in self.parts), self.numbytes)
        assert all(part.file_offset + part.numbytes <= stop for part, stop in zip(self.parts, starts[1:], strict=True))
        assert all(region.file_offset % ITEMSIZE[region.dtype] == 0 for region in self.regions)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The parts that are read."""
        return tuple(part for part in self.parts if isinstance(part, Region))

    @property
    def summed(self) -> tuple[tuple[int, int], ...]:
        """The first byte, and the number, of those that have sums of pieces: all behind the header, if there is one."""
        first = self.parts[0].numbytes if self.parts and isinstance(self.parts[0], Literal) else 0
        return ((first, self.numbytes - first),) if first < self.numbytes else ()

    @cached_property
    def has_gaps(self) -> bool:
        """Return whether some bytes are no part's and no element's."""
        gaps = sum(part.numbytes for part in self.parts) < self.numbytes
        return gaps or any(region.is_padded for region in self.regions)


@dataclass(frozen=True)
class OutputPlan:
    """Everything to write.

    Attributes:
        files: the files that hold tensors.
        finish: writes the rest into the folder, an index last, and makes sure that the result can be opened. It is called on rank
            0 when the files are whole, with the sums of these files.
        view: the view that regions are of, if it isn't the one that the plan was made from.
        rest_numbytes: size of the rest, about.
        finish_records: called on rank 0 before ``finish``, if files have ``records``: with their sums, by the file's name.
    """

    files: tuple[OutputFile, ...]
    finish: Callable[[Path, Sequence[FileSums]], None] = lambda folder, sums: None
    rest_numbytes: int = 0
    finish_records: Callable[[Path, Mapping[str, Sequence[Run]]], None] = lambda folder, runs: None
    view: UniversalView | None = None


class Output(ABC):
    """A form to write, with its settings.

    Attributes:
        on_differing: which number to write where partitions have different ones, and which copy of a parameter where pipeline
            stages have different ones and nothing tells which was trained.
    """

    on_differing: OnDiffering = "error"

    @abstractmethod
    def plan(self, view: UniversalView) -> OutputPlan:
        """Return what to write, the same on all ranks. It is called on each, reads no tensor and writes nothing.

        Raises:
            MismatchError, UnsupportedError: the form can't hold what the checkpoint holds.
            ConfigError: a setting doesn't fit.
        """

    def notes(self, view: UniversalView) -> list[str]:
        """Return what the form doesn't keep of this checkpoint, and what its own library makes of it, for people."""
        return []
