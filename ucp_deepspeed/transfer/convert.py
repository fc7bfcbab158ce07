"""Any checkpoint → the universal format, in one pass.

The layout of the output is known before data moves, so that each byte is written once, at its final place: a worker takes a
range of an output file, gathers what belongs there from the source files into a buffer of bounded size, and writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import safetensors.torch
import torch

from ucp_deepspeed.checkpoint.torch_files import NAMED_DTYPES
from ucp_deepspeed.checkpoint.universal import CLIENT_TENSORS_NAME, INDEX_NAME, atom_key
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.transfer.commit import committed_folder
from ucp_deepspeed.transfer.copying import FileReader, TransferCount, gather
from ucp_deepspeed.transfer.describing import describe

CHUNK_NUMBYTES = 64 << 20
"""Bytes that one worker gathers before it writes them: large enough for sequential speed, small enough for any machine."""

LOOK_UP_SECONDS = 0.2
"""A signal that comes just before Python begins to wait for a lock is handled at the end of the wait only."""

FILE_NUMBYTES = 4 << 30
"""Bytes of atoms in one file, unless a single atom is larger."""


@dataclass(frozen=True, slots=True)
class Atom:
    """One state of one whole parameter, and where it goes. ``data_offset`` counts bytes from the end of the header."""

    name: str
    state: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    data_offset: int

    @property
    def numbytes(self) -> int:
        """Its size."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class AtomFile:
    """One output file: its atoms, end to end after the header."""

    file_name: str
    atoms: tuple[Atom, ...]

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, padded so that the data starts on 64 bytes."""
        entries = {
            atom_key(atom.name, atom.state): {
                "dtype": atom.dtype,
                "shape": list(atom.shape),
                "data_offsets": [atom.data_offset, atom.data_offset + atom.numbytes],
            }
            for atom in self.atoms
        }
        text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(len(text) + 8) % 64)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def data_numbytes(self) -> int:
        """Bytes after the header."""
        return sum(atom.numbytes for atom in self.atoms)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A range of one file's data that one worker fills; ``atoms`` are those that meet it."""

    file: AtomFile
    data_start: int
    data_stop: int
    atoms: tuple[Atom, ...]


FIRST_RANDOM_STATE_NAME = "ucp_random_state_rank_00000.json"
"""From its seed, new streams of random numbers are derived on any topology (``docs/format.md``, *Random state*)."""


def convert(
    view: UniversalView,
    destination: Path,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
    chunk_numbytes: int = CHUNK_NUMBYTES,
    file_numbytes: int = FILE_NUMBYTES,
    drop_client_state: Collection[str] = (),
) -> TransferCount:
    """Write the universal form of a checkpoint to a new folder.

    Args:
        destination: the folder to make; it appears when everything is in it.
        workers: threads; each needs one buffer of ``chunk_numbytes``.
        progress: called with (bytes written, bytes to write) after each chunk, from one thread at a time.
        drop_client_state: top-level keys of the client state to leave out.

    Raises:
        ConfigError: the folder exists already, or would lie in a file, or the client state has no such key; nothing is written.
        UnsupportedError: the client state, a scheduler or a hyper-parameter holds something that has no universal form;
            nothing is written.
        DamagedCheckpointError: a source file is missing or truncated; nothing is left behind.
        MismatchError: the files don't hold each element of each parameter exactly once; nothing is left behind.
        OSError: the disk is full, or can't be written; nothing is left behind.
    """
    if destination.exists():  # before anything is read; `committed_folder` is what makes sure
        raise ConfigError(f"{destination} exists already; nothing was written")
    if blocking := next((parent for parent in destination.parents if parent.exists() and not parent.is_dir()), None):
        raise ConfigError(f"{blocking} is a file; nothing was written")
    files = lay_out(view, file_numbytes)
    homes = {(atom.name, atom.state): file.file_name for file in files for atom in file.atoms}
    index, tensors = describe(view, homes, drop_client_state)
    with committed_folder(destination) as folder:
        count = _write_atoms(view, folder, files, workers, progress, chunk_numbytes)
        if tensors:
            safetensors.torch.save_file(tensors, folder / CLIENT_TENSORS_NAME)
        sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
        index = index.model_copy(update={"files": sizes})
        random_state = view.checkpoint.path / FIRST_RANDOM_STATE_NAME
        if random_state.is_file():
            shutil.copyfile(random_state, folder / FIRST_RANDOM_STATE_NAME)
        (folder / INDEX_NAME).write_text(index.model_dump_json(indent=1), encoding="utf-8")
    return count


def lay_out(view: UniversalView, file_numbytes: int = FILE_NUMBYTES) -> tuple[AtomFile, ...]:
    """Which atom goes where: by parameter, widest elements first within a file so that all are aligned."""
    sizes = [
        (name, state, dtype, view.logical_shape(name), torch.Size(view.logical_shape(name)).numel())
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


def _write_atoms(
    view: UniversalView,
    folder: Path,
    files: Sequence[AtomFile],
    workers: int,
    progress: Callable[[int, int], None] | None,
    chunk_numbytes: int,
) -> TransferCount:
    total = sum(file.data_numbytes for file in files)
    count, lock = TransferCount(), threading.Lock()
    written = 0
    reader = FileReader()
    descriptors: dict[str, int] = {}
    stop = threading.Event()
    buffers = _buffers(max(workers, 1), min(_unit(chunk_numbytes), max(file.data_numbytes for file in files)))

    def work(chunk: _Chunk) -> None:
        nonlocal written
        if stop.is_set():
            return
        buffer = buffers.get()
        try:
            done = _fill_chunk(view, chunk, buffer, descriptors[chunk.file.file_name], reader)
        finally:
            buffers.put(buffer)
        with lock:
            count.add(done)
            written += chunk.data_stop - chunk.data_start
            if progress is not None:
                progress(written, total)

    try:
        for file in files:
            descriptors[file.file_name] = _create(folder / file.file_name, file)
        with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
            try:
                futures = [pool.submit(work, chunk) for file in files for chunk in _chunks(file, chunk_numbytes)]
                _wait(futures)
            except BaseException:
                stop.set()
                raise
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        reader.close()
    return count


def _wait(futures: Collection[Future[None]]) -> None:
    """Until all are done, or one has failed, whose error is raised. Looks up in between, so that signals are handled in time."""
    pending: set[Future[None]] = set(futures)
    while pending:
        done, pending = wait(pending, timeout=LOOK_UP_SECONDS, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _buffers(count: int, numbytes: int) -> SimpleQueue[torch.Tensor]:
    """The workers' buffers, used again and again: allocated anew for each chunk they would leave holes in the heap."""
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(count):
        buffers.put(torch.empty(numbytes, dtype=torch.uint8))
    return buffers


def _unit(chunk_numbytes: int) -> int:
    """Size of a chunk, on an element boundary of every dtype."""
    return max(chunk_numbytes // 8, 1) * 8


def _create(path: Path, file: AtomFile) -> int:
    """Make an output file of its final size with its header; returns an open descriptor."""
    header = file.header
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.truncate(descriptor, len(header) + file.data_numbytes)
        _write_all(descriptor, memoryview(header), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _chunks(file: AtomFile, chunk_numbytes: int) -> Iterator[_Chunk]:
    """Cut a file's data into ranges of about ``chunk_numbytes``, on element boundaries."""
    unit = _unit(chunk_numbytes)
    first = 0
    for start in range(0, file.data_numbytes, unit):
        stop = min(start + unit, file.data_numbytes)
        while file.atoms[first].data_offset + file.atoms[first].numbytes <= start:
            first += 1
        met = first
        while met < len(file.atoms) and file.atoms[met].data_offset < stop:
            met += 1
        yield _Chunk(file, start, stop, file.atoms[first:met])


def _fill_chunk(
    view: UniversalView, chunk: _Chunk, buffer: torch.Tensor, descriptor: int, reader: FileReader
) -> TransferCount:
    count = TransferCount()
    for atom in chunk.atoms:
        itemsize = ITEMSIZE[atom.dtype]
        start = max(chunk.data_start, atom.data_offset)
        stop = min(chunk.data_stop, atom.data_offset + atom.numbytes)
        target = buffer[start - chunk.data_start : stop - chunk.data_start].view(NAMED_DTYPES[atom.dtype])
        count.add(gather(view, atom.name, atom.state, (start - atom.data_offset) // itemsize, target, reader))
    filled = buffer[: chunk.data_stop - chunk.data_start].numpy()
    _write_all(descriptor, memoryview(filled), len(chunk.file.header) + chunk.data_start)
    return count


def _write_all(descriptor: int, data: memoryview, file_offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, file_offset)
        data, file_offset = data[written:], file_offset + written
