"""The place of each byte of a universal checkpoint, known before any is read: atoms, their files, and who writes what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.universal.catalog import atom_key
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE


@dataclass(frozen=True, slots=True)
class Atom:
    """One state of one whole parameter, and its place. ``data_offset`` counts bytes from the end of the header."""

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    data_offset: int

    @property
    def numbytes(self) -> int:
        """Size of the atom in bytes."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class AtomFile:
    """One output file: its atoms, end to end after the header."""

    file_name: str
    atoms: tuple[Atom, ...]

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, padded so that the data starts on a block."""
        entries = {
            atom_key(atom.name, atom.state): {
                "dtype": atom.dtype,
                "shape": list(atom.shape),
                "data_offsets": [atom.data_offset, atom.data_offset + atom.numbytes],
            }
            for atom in self.atoms
        }
        text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(len(text) + 8) % tunables.BLOCK_NUMBYTES)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def data_numbytes(self) -> int:
        """Bytes after the header."""
        return sum(atom.numbytes for atom in self.atoms)

    def page_start(self, data_offset: int) -> int:
        """Return where the page that holds this byte begins in the data; for a byte outside, the nearer end of the data."""
        header = len(self.header)
        start = (header + data_offset) // tunables.PAGE_NUMBYTES * tunables.PAGE_NUMBYTES - header
        return self.data_numbytes if data_offset >= self.data_numbytes else max(start, 0)


@dataclass(frozen=True, slots=True)
class DataRange:
    """A part of one file's data, in bytes from the end of the header."""

    file: AtomFile
    data_start: int
    data_stop: int

    @property
    def numbytes(self) -> int:
        """Size of the range in bytes."""
        return self.data_stop - self.data_start


@dataclass(frozen=True, slots=True)
class Chunk(DataRange):
    """A range that one worker fills at once; ``atoms`` are those that overlap it."""

    atoms: tuple[Atom, ...]


def lay_out(view: UniversalView, file_numbytes: int = tunables.FILE_NUMBYTES) -> tuple[AtomFile, ...]:
    """Place all atoms in files: by parameter, widest elements first within a file so that all are aligned."""
    sizes = [
        (name, state, dtype, view.logical_shape(name), prod(view.logical_shape(name)))
        for name, parameter in view.parameters.items()
        for state, dtype in parameter.states.items()
    ]
    bins: list[list[tuple[str, str, str, tuple[int, ...], int]]] = [[]]
    held = 0
    for entry in sizes:
        numbytes = entry[4] * ITEMSIZE[entry[2]]
        if bins[-1] and held + numbytes > file_numbytes:
            bins.append([])
            held = 0
        bins[-1].append(entry)
        held += numbytes
    return tuple(
        AtomFile(f"atoms-{number:05d}-of-{len(bins):05d}.safetensors", _placed(entries))
        for number, entries in enumerate(bins, 1)
    )


def _placed(entries: Sequence[tuple[str, str, str, tuple[int, ...], int]]) -> tuple[Atom, ...]:
    atoms: list[Atom] = []
    offset = 0
    for name, state, dtype, shape, numel in sorted(entries, key=lambda entry: -ITEMSIZE[entry[2]]):
        atoms.append(Atom(name, state, dtype, shape, numel, offset))
        offset += atoms[-1].numbytes
    return tuple(atoms)


def share_of(files: Sequence[AtomFile], rank: int, ranks: int) -> tuple[DataRange, ...]:
    """Return the ranges that one of so many ranks writes. All shares have about as many bytes, whatever atoms and files they are
    in.

    Ranges end with pages, so that shares differ by up to a page.
    """
    total = sum(file.data_numbytes for file in files)
    start, stop = total * rank // ranks, total * (rank + 1) // ranks
    found: list[DataRange] = []
    for file in files:
        held = DataRange(file, file.page_start(start), file.page_start(stop))
        if held.numbytes:
            found.append(held)
        start, stop = start - file.data_numbytes, stop - file.data_numbytes
    return tuple(found)


def unit_of(chunk_numbytes: int) -> int:
    """Return the size of a chunk, rounded down to an element boundary of every dtype."""
    return max(chunk_numbytes // 8, 1) * 8


def chunks_of(held: DataRange, chunk_numbytes: int) -> Iterator[Chunk]:
    """Cut a range into chunks of about ``chunk_numbytes``, on element boundaries."""
    atoms, unit = held.file.atoms, unit_of(chunk_numbytes)
    first = 0
    for start in range(held.data_start, held.data_stop, unit):
        stop = min(start + unit, held.data_stop)
        while atoms[first].data_offset + atoms[first].numbytes <= start:
            first += 1
        met = first
        while met < len(atoms) and atoms[met].data_offset < stop:
            met += 1
        yield Chunk(held.file, start, stop, atoms[first:met])
