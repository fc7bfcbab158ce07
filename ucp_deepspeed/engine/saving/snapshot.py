"""Snapshots: the content of a ``torch.save`` file, copied at once into host memory, and written later, byte for byte as
``torch.save`` would have written it. So tensors that share a storage still do.
"""

from __future__ import annotations

import ctypes
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch.serialization import DEFAULT_PROTOCOL

from ucp_deepspeed import tunables
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

    def write(self, folder: Path) -> None:
        """Write the file and wait until it is on disk. The interpreter's lock is free while tensors are written.

        Raises:
            OSError: the file can't be created, or the disk is full or fails.
            RuntimeError: torch's error for a write that failed for no lasting reason.
        """
        path = folder / self.name
        path.touch()  # this tells why it can't be created; torch doesn't
        opened = torch.serialization._open_zipfile_writer(str(path))
        writer = opened.__enter__()
        try:
            for name, data in self.records:
                if isinstance(data, bytes):
                    writer.write_record(name, data, len(data))
                else:
                    writer.write_record(name, data.untyped_storage(), data.numel())
            opened.__exit__()
        except Exception as error:
            # Keep the writer for ever. Its destructor would try to complete the file, fail again, and end the process
            # (``std::terminate``, torch 2.13).
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(writer))
            reason = _why_not_longer(path)
            os.truncate(path, 0)  # it stays open: give back its space
            if reason is None:
                raise
            raise reason from error
        flush(path)


def _why_not_longer(path: Path) -> OSError | None:
    """Return the error that keeps a file from growing; torch doesn't tell it."""
    try:
        with path.open("ab") as file:
            file.write(bytes(tunables.PROBE_NUMBYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


class HostBuffers:
    """Buffers in host memory that one save after the other uses; pinned if there is an accelerator.

    A buffer has exactly the size that is asked for: the sizes of a run's tensors don't change from save to save.

    Attributes:
        taken: buffers taken since the last `reuse`.
        bytes_copied: bytes copied into buffers since then.
    """

    def __init__(self) -> None:
        self.bytes_copied = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self.taken: list[torch.Tensor] = []
        self._pinned = get_accelerator().device_name() != "cpu"

    @property
    def bytes_held(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() for buffer in (*self.taken, *(one for free in self._free.values() for one in free)))

    def reuse(self) -> None:
        """Let all buffers be taken anew; free those that the last save didn't take."""
        self._free, taken, self.taken, self.bytes_copied = {}, self.taken, [], 0
        for buffer in taken:
            self._free.setdefault(buffer.numel(), []).append(buffer)

    def take(self, size: int) -> torch.Tensor:
        """Return a buffer of so many bytes, with undefined content."""
        free = self._free.get(size)
        buffer = free.pop() if free else self._new(size)
        self.taken.append(buffer)
        return buffer

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Begin to copy; `wait` ends it."""
        self.bytes_copied += source.numel() * source.element_size()
        plain = source.is_contiguous() and not (source.is_conj() or source.is_neg())
        if plain and source.device.type == "cpu" and target.is_contiguous():
            _copy_bytes(_bytes(source), _bytes(target))
        else:
            target.copy_(source, non_blocking=self._pinned)

    def wait(self) -> None:
        """Wait until all copies are done."""
        if self._pinned:
            get_accelerator().synchronize()

    def _new(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # later saves write to it outside of that mode
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._pinned and size > 0)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def _copy_bytes(source: np.ndarray, target: np.ndarray) -> None:
    """Copy with the C library's ``memmove``, which goes around the caches and takes two thirds of the time of torch's own
    copy."""
    threads = torch.get_num_threads()
    if threads == 1 or source.size < tunables.LEAST_SHARED_NUMBYTES:
        np.copyto(target, source)
        return
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(np.copyto, np.array_split(target, threads), np.array_split(source, threads)))
    except RuntimeError:  # no thread can be started: the process has come to its end
        np.copyto(target, source)


def snapshot(state: Any, file_name: str, buffers: HostBuffers, apart: bool) -> FileSnapshot:
    """Copy everything that ``torch.save(state)`` would write; later changes of ``state`` aren't in the copy.

    Args:
        apart: give each tensor a storage of its own on the CPU, of its own size, as DeepSpeed's
            ``checkpoint/utils.py::clone_tensors_for_torch_save`` does before it saves. Here the copy is the only one.

    Raises:
        Exception: any error that pickling raises.
    """
    placed: dict[int, torch.Tensor] = {}
    found, storages = _records(_apart(state, buffers, placed) if apart else state)
    records: list[tuple[str, bytes | torch.Tensor]] = []
    for name, data in found:
        if data is None:
            storage = storages[name.removeprefix("data/")]
            data = placed.get(storage._cdata)
            if data is None:
                data = buffers.take(storage.nbytes())
                buffers.copy(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), data)
        records.append((name, data))
    buffers.wait()
    return FileSnapshot(file_name, tuple(records))


def _records(state: Any) -> tuple[list[tuple[str, bytes | None]], dict[str, torch.UntypedStorage]]:
    """Return the records of the zip file, in order, with None for the contents of storages; and the storages by their keys.

    torch's own ``_save`` makes the records, so that they are those of its version.
    """
    zip_file = _Collector()
    storages: dict[str, torch.UntypedStorage] = {}

    class Pickler(pickle.Pickler):
        """Base of the pickler in ``_save``; it sees which key the pickler gives to which storage."""

        def __init_subclass__(cls) -> None:
            identify = cls.persistent_id

            def persistent_id(self: Any, obj: Any) -> Any:
                identity = identify(self, obj)
                if identity is not None:
                    storages[identity[2]] = getattr(obj, "_untyped_storage", obj)
                return identity

            cls.persistent_id = persistent_id  # type: ignore[method-assign]

    with torch.serialization.skip_data():
        torch.serialization._save(state, zip_file, SimpleNamespace(Pickler=Pickler), DEFAULT_PROTOCOL, False)
    found = dict(storages)
    storages.clear()  # the class would keep them, and only the garbage collector frees it
    return zip_file.records, found


class _Collector:
    """Stands in for torch's ``PyTorchFileWriter``, and collects the records."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes | None]] = []

    def write_record(self, name: str, data: str | bytes, size: int) -> None:
        self.records.append((name, data.encode() if isinstance(data, str) else data))

    def write_record_metadata(self, name: str, size: int) -> None:
        self.records.append((name, None))


def _apart(item: Any, buffers: HostBuffers, placed: dict[int, torch.Tensor]) -> Any:
    """Copy the containers and tensors that ``clone_tensors_for_torch_save`` copies."""
    if torch.is_tensor(item):
        return _placed(item.detach(), buffers, placed)
    if isinstance(item, list):
        return [_apart(value, buffers, placed) for value in item]
    if isinstance(item, tuple):
        return tuple(_apart(value, buffers, placed) for value in item)
    if isinstance(item, dict):
        return type(item)({key: _apart(value, buffers, placed) for key, value in item.items()})
    return item


def _placed(tensor: torch.Tensor, buffers: HostBuffers, placed: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return a clone on the CPU whose memory is a buffer; ``placed`` gets the buffer of its storage."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")
    like = torch.empty_like(tensor, device="meta")  # with the strides that a clone has
    buffer = buffers.take(like.untyped_storage().nbytes())
    clone = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
        buffer.untyped_storage(), 0, like.shape, like.stride()
    )
    buffers.copy(tensor, clone)
    placed[clone.untyped_storage()._cdata] = buffer
    return clone
