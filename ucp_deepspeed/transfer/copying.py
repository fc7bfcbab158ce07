"""Reading files through memory maps and copying strided blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.checkpoint.torch_files import NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.layout import Layout
from ucp_deepspeed.plan import BlockCopy, Fragment, StridedView, Target, plan_tensor

T = TypeVar("T")

_PLANNING = threading.Lock()
"""Held while a plan asks the catalog: that may open files, and torch's allow-list of classes belongs to the whole process."""


@dataclass
class TransferCount:
    """What a transfer read: bytes, block copies, and the files they came from."""

    bytes_read: int = 0
    copies: int = 0
    files: set[str] = field(default_factory=set)

    def add(self, other: TransferCount) -> None:
        """Add another transfer's figures."""
        self.bytes_read += other.bytes_read
        self.copies += other.copies
        self.files |= other.files


class FileReader:
    """Memory-mapped files. Thread-safe; a file stays mapped until `close`."""

    def __init__(self) -> None:
        self._maps: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def block(self, view: StridedView[FileExtent], shape: tuple[int, ...]) -> torch.Tensor:
        """A block inside an extent, still on disk until it is used, where its elements are aligned.

        Raises:
            DamagedCheckpointError: the file is missing or ends before the extent does.
        """
        extent, itemsize = view.buffer, ITEMSIZE[view.buffer.dtype]
        whole = self._map(extent.path)
        stop = extent.file_offset + extent.numel * itemsize
        if stop > whole.numel():
            raise DamagedCheckpointError(f"{extent.path} is truncated: expected {stop} bytes, found {whole.numel()}")
        span = 1 + sum((count - 1) * stride for count, stride in zip(shape, view.strides, strict=True))
        start = extent.file_offset + view.start * itemsize
        raw = whole[start : start + span * itemsize]
        # torch reads aligned memory only; safetensors files of others' may hold elements anywhere.
        aligned = raw if start % itemsize == 0 else raw.clone()
        return aligned.view(NAMED_DTYPES[extent.dtype]).as_strided(shape, view.strides)

    def close(self) -> None:
        """Forget the maps; each is unmapped with the last tensor that uses it."""
        self._maps.clear()

    def _map(self, path: str) -> torch.Tensor:
        with self._lock:
            if path not in self._maps:
                if not Path(path).is_file():
                    raise DamagedCheckpointError(f"{path} is missing")
                # Copy-on-write: torch wants writable memory, and the file must never change. Nothing can't be mapped.
                empty = Path(path).stat().st_size == 0
                raw = np.empty(0, np.uint8) if empty else np.memmap(path, dtype=np.uint8, mode="c")
                self._maps[path] = torch.from_numpy(raw)
            return self._maps[path]


def run_copies(
    copies: Iterable[BlockCopy[FileExtent, T]], reader: FileReader, buffer: Callable[[T], torch.Tensor]
) -> TransferCount:
    """Carry out block copies; values are converted to the target buffer's dtype.

    Args:
        buffer: the target buffer of a key, contiguous and on any device; it is indexed as one-dimensional.
    """
    count = TransferCount()
    for copy in copies:
        target = _block(buffer(copy.target.buffer), copy.target, copy.shape)
        blocks = [reader.block(view, copy.shape) for view in copy.sources]
        target.copy_(blocks[0] if len(blocks) == 1 and copy.factor == 1 else _combined(blocks, copy.factor))
        count.copies += 1
        for view, block in zip(copy.sources, blocks, strict=True):
            count.bytes_read += block.numel() * block.element_size()
            count.files.add(view.buffer.path)
    return count


def _combined(blocks: list[torch.Tensor], factor: Fraction) -> torch.Tensor:
    """Mean of the blocks times the factor, in double precision: the mean of equal values is that value, exactly."""
    total = blocks[0].to(torch.float64)
    for block in blocks[1:]:
        total = total + block
    return total * factor.numerator / (len(blocks) * factor.denominator)


def _block(flat: torch.Tensor, view: StridedView[T], shape: tuple[int, ...]) -> torch.Tensor:
    return flat.as_strided(shape, view.strides, flat.storage_offset() + view.start)


def gather(
    view: UniversalView, name: str, state: str, flat_start: int, target: torch.Tensor, reader: FileReader
) -> TransferCount:
    """Fill ``target`` with a run of consecutive (row-major) elements of one whole parameter's state.

    Args:
        flat_start: position of the first element in the logical tensor.
        target: one-dimensional; its length says how many elements.

    Raises:
        MismatchError: the checkpoint doesn't hold each of them exactly once, or scales them in a way that isn't known.
        DamagedCheckpointError: a source file is missing or truncated.
    """
    layout = Layout.whole(view.logical_shape(name))
    fragment = Fragment(flat_start, target.numel(), None, 0)
    try:
        with _PLANNING:
            copies = plan_tensor(view.source(name, state), Target(layout, 0, (fragment,)), state)
    except ValueError as error:
        raise MismatchError(
            f"{view.checkpoint.path} doesn't give whole parameters", [f"{name}/{state}: {error}"]
        ) from error
    return run_copies(copies, reader, lambda _: target)
