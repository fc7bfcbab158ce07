"""torch's file format before its zip archives. DeepSpeed writes it with ``"checkpoint_serialization": false``.

A pickle of the object comes first, then the keys of its storages, then the storages one after the other. Each storage follows
its number of elements (``torch/serialization.py::_legacy_save``).
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import _element_size
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from torch.storage import TypedStorage

from ucp_deepspeed.checkpoint.torch_files.unpickling import Unpickler

_NUMEL = struct.Struct("<q")
"""The number of elements before each storage."""


def is_legacy(path: Path) -> bool:
    """Return whether the file begins like one of this format: with a pickle."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def unpickle_legacy(path: Path, tensors: bool) -> Any:
    """Return the object in the file. None of its code is run.

    Args:
        path: a file that `is_legacy`.
        tensors: read the tensors. If False, they are on the meta device, and ``_checkpoint_offset`` of their storages tells where
            they begin in the file, in bytes.

    Raises:
        pickle.UnpicklingError: the file is of another format, refused or truncated. Damage may raise other errors too, as in
            ``torch.load``.
    """
    with path.open("rb") as file:
        storages = _Storages("cpu" if tensors else "meta")
        found, expected = [Unpickler(file).load() for _ in range(2)], [MAGIC_NUMBER, PROTOCOL_VERSION]
        if found != expected:
            raise pickle.UnpicklingError(f"begins with {found}, where torch's older format has {expected}")
        if not Unpickler(file).load()["little_endian"]:
            raise pickle.UnpicklingError("was written by a machine that is big-endian")
        unpickler = Unpickler(file)
        unpickler.persistent_load = storages.make
        loaded = unpickler.load()
        storages.place(Unpickler(file).load(), file, path.stat().st_size, tensors)
    return loaded


class _Storages:
    """The storages of a file, by key."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._made: dict[str, TypedStorage] = {}

    def make(self, reference: Any) -> TypedStorage:
        """Return the storage that a pickle refers to."""
        kind, storage_type, key, _, numel, view = reference
        if kind != "storage" or view is not None or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError(f"refers to {reference!r:.100}, which isn't a storage")
        if key not in self._made:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            untyped = torch.UntypedStorage(numel * _element_size(dtype), device=self._device)
            self._made[key] = TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._made[key]

    def place(self, keys: Any, file: BinaryIO, file_numbytes: int, tensors: bool) -> None:
        """Tell each storage where its bytes are, or read them. They follow in the order of the keys."""
        if sorted(keys) != sorted(self._made):
            raise pickle.UnpicklingError("lists other storages than it refers to")
        start = file.tell()
        for key in keys:
            typed = self._made[key]
            storage = typed._untyped_storage
            file.seek(start)
            numel = _NUMEL.unpack(file.read(_NUMEL.size))[0]
            start += _NUMEL.size
            if numel * _element_size(typed.dtype) != storage.nbytes() or start + storage.nbytes() > file_numbytes:
                raise pickle.UnpicklingError(
                    f"is truncated: storage {key} of {storage.nbytes()} bytes, file of {file_numbytes}"
                )
            if tensors:
                file.readinto(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # type: ignore[attr-defined, call-overload]
            else:
                storage._checkpoint_offset = start  # type: ignore[attr-defined]
            start += storage.nbytes()
