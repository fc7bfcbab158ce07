"""Entries of a DCP folder: where the elements of a chunk lie in its file, and the values of what is small or no tensor."""

from __future__ import annotations

import copy
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.bounds import check_inside, check_regular, misshapen
from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.checkpoint.dcp.metadata import Metadata, Part, StoredTensor
from ucp_deepspeed.checkpoint.torch_files.parts import is_archive, open_part
from ucp_deepspeed.checkpoint.torch_files.safe_load import extent_of, read_tensors
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError, naming
from ucp_deepspeed.layout import Box, Layout, LocalTensor, Shape
from ucp_deepspeed.layout.layout import pieces_of

MISSING_HINT = "fetch it again from where it is whole, or take another checkpoint"

SHORT_NUMBYTES = 1 << 12
"""Entries up to this size are compared by their bytes: thousands of hyper-parameters have a few different values."""


class Entries:
    """The entries of one folder. Files are opened when one of their entries is asked for."""

    def __init__(self, metadata: Metadata, versions: FileVersions) -> None:
        self.metadata, self.folder, self._versions = metadata, metadata.path.parent, versions
        self._values: dict[bytes, Any] = {}
        self.extent = lru_cache(maxsize=None)(self._find_extent)
        self.layout = lru_cache(maxsize=None)(self._find_layout)

    def check_files(self) -> None:
        """Check that each file is there, and as long as it must be; raise a DamagedCheckpointError."""
        for name, numbytes in sorted(self.metadata.sizes.items()):
            path = self.folder / name
            check_inside(path)
            check_regular(path)
            if not path.is_file():
                raise DamagedCheckpointError(f"{path} is missing, and {self.metadata.path} names it; {MISSING_HINT}")
            if (size := path.stat().st_size) < numbytes:
                told = f"{path} is truncated: it has {size} bytes, and entries up to byte {numbytes}"
                raise DamagedCheckpointError(f"{told}; {MISSING_HINT}")
        for tensor in self.metadata.tensors.values():
            for part in tensor.chunks.values():
                self._check_form(part)
                return

    def value(self, key: str) -> Any:
        """Return an object, or a whole tensor, read to the CPU. What isn't allowed in it is an `Opaque`.

        Raises:
            DamagedCheckpointError, UnsupportedError: see `open_part`; or chunks are missing, overlap or have another shape.
        """
        tensor = self.metadata.tensors.get(key)
        if tensor is None:
            return self._read(self.metadata.objects[key])
        if [box.shape for box in tensor.chunks] != [tensor.shape]:
            if 0 in tensor.shape:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            return self._put_together(key, tensor)
        ((_, part),) = tensor.chunks.items()
        return self._read(part)

    def _find_layout(self, key: str) -> Layout:
        """Return the layout of a tensor whose boxes are the stored chunks.

        Raises:
            DamagedCheckpointError: chunks are missing, or overlap.
        """
        tensor = self.metadata.tensors[key]
        try:
            held = (LocalTensor(box.shape, pieces_of(box, (0,) * len(box.shape))) for box in tensor.chunks)
            return Layout(tensor.shape, tuple(held))
        except ValueError as error:
            told = f"{self.metadata.path} doesn't list the chunks of a whole tensor for {key!r:.80}: {error}"
            raise DamagedCheckpointError(f"{told}; {MISSING_HINT}") from error

    def _put_together(self, key: str, tensor: StoredTensor) -> torch.Tensor:
        self.layout(key)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if sum(part.numbytes for part in tensor.chunks.values()) >= whole.nbytes:
            whole = torch.empty_like(whole, device="cpu")
        for box, part in tensor.chunks.items():
            chunk = self._read(part)
            if whole.is_meta or not isinstance(chunk, torch.Tensor) or _kind(chunk) != (box.shape, tensor.dtype):
                told = f"{self.folder / part.file_name} holds something else at byte {part.start}"
                raise DamagedCheckpointError(f"{told} than the chunk of {key!r:.80} at {box.start}; {MISSING_HINT}")
            whole[tuple(map(slice, box.start, box.stop))] = chunk
        return whole

    def number(self, key: str) -> float:
        """Return the number in an entry.

        Raises:
            DamagedCheckpointError: it holds something else.
        """
        value = self.value(key)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        if not isinstance(value, int | float):
            raise DamagedCheckpointError(f"{self.folder}: {key!r:.80} is a {type(value).__name__}, not a number")
        return value

    def _read(self, part: Part) -> Any:
        path = self._noted(part)
        if part.numbytes > SHORT_NUMBYTES:
            return self._opened(path, part)
        with naming(path), path.open("rb", buffering=0) as file:
            file.seek(part.start)
            content = file.read(part.numbytes)
        if content not in self._values:
            self._values[content] = self._opened(path, part)
        found = self._values[content]
        return found if isinstance(found, int | float | str | None) else copy.deepcopy(found)

    def _opened(self, path: Path, part: Part) -> Any:
        value = self._described(path, part)
        if why := misshapen(value):
            raise DamagedCheckpointError(f"{path} holds what can't be read, at byte {part.start}: {why}")
        return read_tensors(value, path)

    def _find_extent(self, key: str, box: Box) -> FileExtent:
        """Return the file range of the chunk of a tensor that is a box of it.

        Raises:
            DamagedCheckpointError: the file holds something else there.
            UnsupportedError: the chunk isn't in row-major order.
        """
        tensor = self.metadata.tensors[key]
        part = tensor.chunks[box]
        path = self._noted(part)
        held = self._described(path, part)
        at = f"the chunk of {key!r:.80} at {box.start}"
        if not isinstance(held, torch.Tensor) or held.dtype != tensor.dtype or held.numel() != prod(box.shape):
            found = (
                f"{held.dtype}, shape {tuple(held.shape)}" if isinstance(held, torch.Tensor) else type(held).__name__
            )
            expected = f"{tensor.dtype}, shape {box.shape}"
            told = f"{path} holds {found} at byte {part.start}, for {at} of {expected}"
            raise DamagedCheckpointError(f"{told}: it isn't of the save of {self.metadata.path}; {MISSING_HINT}")
        if not held.is_contiguous():
            told = f"{path} holds {at} with strides {held.stride()}, not in row-major order"
            raise UnsupportedError(f"{told}; make the tensor contiguous before it is saved")
        return extent_of(held, path)

    def _described(self, path: Path, part: Part) -> Any:
        self._check_form(part)
        return open_part(path, part.start, part.numbytes)

    def _check_form(self, part: Part) -> None:
        """Refuse what ``torch.save`` hasn't written. A save as safetensors is found out by its first tensor."""
        path = self.folder / part.file_name
        if not is_archive(path, part.start):
            raise UnsupportedError(
                f"{path} has no value of torch.save at byte {part.start}: it was saved as safetensors, or is damaged. Save it "
                f"with serialization_format=SerializationFormat.TORCH_SAVE, torch's default, or {MISSING_HINT}"
            )

    def _noted(self, part: Part) -> Path:
        path = self.folder / part.file_name
        self._versions.note(path)
        return path


def _kind(tensor: torch.Tensor) -> tuple[Shape, torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
