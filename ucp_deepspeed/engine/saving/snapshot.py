"""Snapshots: the content of a ``torch.save`` file, copied into host memory, and written later, byte for byte as ``torch.save``
would have written it. So tensors that share a storage still do.

`describe` makes everything but the bytes of tensors, so that it is known what these take before it is taken.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checksums import sum_of
from ucp_deepspeed.checkpoint.torch_files.writing import records_to_save
from ucp_deepspeed.engine.saving.host_memory import HostMemory
from ucp_deepspeed.engine.saving.written import why_not_written
from ucp_deepspeed.transfer.commit import flush


@dataclass(frozen=True, slots=True)
class FileSnapshot:
    """A file that is still to be written.

    Attributes:
        name: its path in the tag folder.
        records: records of the zip file, in order: name → bytes, or a buffer of bytes on the host.
    """

    name: str
    records: tuple[tuple[str, bytes | torch.Tensor], ...]

    def write(self, folder: Path, checksums: bool = False) -> dict[str, list[int]]:
        """Write the file and wait until it is on disk. The interpreter's lock is free while tensors are written.

        Returns:
            If ``checksums`` are wanted, the sums of the pieces of each tensor's record, as it is in memory.

        Raises:
            OSError: the file can't be created, or the disk is full or fails.
            RuntimeError: torch's error for a write that failed for no lasting reason.
        """
        path, sums = folder / self.name, dict[str, list[int]]()
        path.touch()  # this tells why it can't be created; torch doesn't
        opened = torch.serialization._open_zipfile_writer(str(path))
        writer = opened.__enter__()
        try:
            for name, data in self.records:
                if isinstance(data, bytes):
                    writer.write_record(name, data, len(data))
                else:
                    if checksums and data.numel():
                        sums[name] = _sums(data)
                    writer.write_record(name, data.untyped_storage(), data.numel())
            opened.__exit__()
        except Exception as error:
            # Keep the writer for ever. Its destructor would try to complete the file, fail again, and end the process
            # (``std::terminate``, torch 2.13).
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(writer))
            reason = why_not_written(path)
            if reason is None:
                raise
            raise reason from error
        flush(path)
        return sums


def _sums(data: torch.Tensor) -> list[int]:
    """Return the checksums of the pieces of a buffer of bytes."""
    memory, piece = memoryview(data.numpy()), tunables.PIECE_NUMBYTES
    return [sum_of(memory[start : start + piece]) for start in range(0, len(memory), piece)]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that is still to be copied.

    Attributes:
        like: a tensor of no memory, with the shape, dtype and strides that the copy has.
    """

    source: torch.Tensor
    like: torch.Tensor

    @property
    def numbytes(self) -> int:
        """Return the bytes that the copy takes."""
        return self.like.untyped_storage().nbytes()

    @property
    def room(self) -> int:
        """Return them up to where the next copy may begin."""
        return -(-self.numbytes // tunables.ALIGNMENT_NUMBYTES) * tunables.ALIGNMENT_NUMBYTES

    @property
    def on_host(self) -> bool:
        """Return whether the tensor is in host memory already."""
        return self.source.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class DescribedFile:
    """A file, with its tensors where they are.

    Attributes:
        name: its path in the tag folder.
        records: records of the zip file, in order: name → bytes, or the tensor with the record's content.
    """

    name: str
    records: tuple[tuple[str, bytes | Copy], ...]

    @property
    def copies(self) -> list[Copy]:
        """Return the tensors to copy."""
        return [data for _, data in self.records if isinstance(data, Copy)]


class HostBuffers:
    """Host memory for snapshots, which one save after the other uses: one piece for what is copied from an accelerator, and one
    for what is on the host. They have the size that is needed, which doesn't change from save to save.

    Attributes:
        taken: buffers of the last save.
        bytes_copied: bytes that it copied into them.
    """

    def __init__(self) -> None:
        self.taken: list[torch.Tensor] = []
        self.bytes_copied = 0
        self._pieces: dict[bool, HostMemory] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of all memory."""
        return sum(piece.numbytes for piece in self._pieces.values())

    def make_room(self, files: Sequence[DescribedFile]) -> tuple[int, int]:
        """Keep what fits these files; free the rest. Return the bytes that `copy` takes anew: for tensors of accelerators, and
        for others."""
        self.taken = []
        wanted = {on_host: sum(copy.room for copy in _of(files, on_host)) for on_host in (False, True)}
        self._pieces = {on_host: piece for on_host, piece in self._pieces.items() if piece.numbytes == wanted[on_host]}
        missing = {on_host: 0 if on_host in self._pieces else numbytes for on_host, numbytes in wanted.items()}
        return missing[False], missing[True]

    def copy(self, files: Sequence[DescribedFile]) -> list[FileSnapshot]:
        """Copy the tensors of these files; later changes of them aren't in the snapshots. Call `make_room` before.

        Raises:
            OSError: the system doesn't give so much memory.
        """
        self.taken, self.bytes_copied = [], 0
        buffers = {id(copy): buffer for on_host in (False, True) for copy, buffer in self._filled(_of(files, on_host))}
        return [
            FileSnapshot(file.name, tuple((name, buffers.get(id(data), data)) for name, data in file.records))  # type: ignore[misc]
            for file in files
        ]

    def _filled(self, copies: Sequence[Copy]) -> list[tuple[Copy, torch.Tensor]]:
        """Return buffers with the tensors' bytes; all of the tensors are on the host, or none is."""
        if not (numbytes := sum(copy.room for copy in copies)):
            return [(copy, torch.empty(0, dtype=torch.uint8, device="cpu")) for copy in copies]
        on_host = copies[0].on_host
        if on_host not in self._pieces:
            self._pieces[on_host] = HostMemory(numbytes, None if on_host else copies[0].source.device)
        starts, piece = accumulate((copy.room for copy in copies), initial=0), self._pieces[on_host]
        found = [(copy, piece.buffer(start, copy.numbytes)) for copy, start in zip(copies, starts, strict=False)]
        piece.fill([(copy.source, _laid_out(copy.like, buffer.untyped_storage())) for copy, buffer in found])
        self.taken += [buffer for _, buffer in found]
        self.bytes_copied += sum(copy.source.numel() * copy.source.element_size() for copy in copies)
        return found


def _of(files: Sequence[DescribedFile], on_host: bool) -> list[Copy]:
    return [copy for file in files for copy in file.copies if copy.on_host == on_host]


def _laid_out(like: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a tensor on the host whose memory is the storage."""
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, like.shape, like.stride())  # type: ignore[call-overload]


def describe(state: Any, file_name: str, apart: bool) -> DescribedFile:
    """Return everything that ``torch.save(state)`` would write but the contents of tensors.

    Args:
        apart: give each tensor a storage of its own on the CPU, of its own size, as DeepSpeed's
            ``checkpoint/utils.py::clone_tensors_for_torch_save`` does before it saves. Here the copy is the only one.

    Raises:
        Exception: any error that pickling raises.
    """
    placed: dict[int, Copy] = {}
    found, storages = records_to_save(_apart(state, placed) if apart else state)
    records: list[tuple[str, bytes | Copy]] = []
    for name, data in found:
        if data is not None:
            records.append((name, data))
        else:
            storage = storages[name.removeprefix("data/")]
            records.append((name, placed.get(storage._cdata) or _whole(storage)))
    return DescribedFile(file_name, tuple(records))


def _whole(storage: torch.UntypedStorage) -> Copy:
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return Copy(source, torch.empty_like(source, device="meta"))


def _apart(item: Any, placed: dict[int, Copy]) -> Any:
    """Take apart the containers and tensors that ``clone_tensors_for_torch_save`` copies."""
    if torch.is_tensor(item):
        return _placed(item.detach(), placed)
    if isinstance(item, list):
        return [_apart(value, placed) for value in item]
    if isinstance(item, tuple):
        return tuple(_apart(value, placed) for value in item)
    if isinstance(item, dict):
        return type(item)({key: _apart(value, placed) for key, value in item.items()})
    return item


def _placed(tensor: torch.Tensor, placed: dict[int, Copy]) -> torch.Tensor:
    """Return what stands for a clone on the CPU, whose memory nobody touches; ``placed`` gets the copy to make by its storage."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")
    copy = Copy(tensor, torch.empty_like(tensor, device="meta"))  # with the strides that a clone has
    clone = _laid_out(copy.like, torch.UntypedStorage(copy.numbytes, device="cpu"))
    placed[clone.untyped_storage()._cdata] = copy
    return clone
