"""Opening ``torch.save`` files without running their code and without reading their tensors.

Tensors come back on the meta device. Their storage keeps the position of their bytes in the file (``torch.load`` records it if
``map_location="meta"``), so that one reader serves these files and safetensors.

torch's format before its zip archives is read too: DeepSpeed writes it with ``"checkpoint_serialization": false``. A pickle of
the object comes first, then the keys of its storages, then the storages one after the other, each behind its number of elements
(``torch/serialization.py::_legacy_save``).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from torch._utils import _element_size
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from torch.storage import TypedStorage

from ucp_deepspeed.checkpoint.bounds import check_regular, misshapen
from ucp_deepspeed.checkpoint.checkpoint import FileExtent, Precision
from ucp_deepspeed.checkpoint.torch_files import unpickling
from ucp_deepspeed.checkpoint.torch_files.archives import Archive, storage_start
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY, refusal, telling_damage
from ucp_deepspeed.checkpoint.torch_files.foreign import Content, opaque_in
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError, why_not_read
from ucp_deepspeed.remote import is_url, numbytes_of

TORCH_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""torch's dtypes by the names of `ucp_deepspeed.dtypes`."""

NAMED_DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in TORCH_DTYPES.items()}
"""The inverse of `TORCH_DTYPES`."""

INTEGERS: dict[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by element size. Elements are compared as this type, so that NaN equals itself and -0.0 isn't 0.0."""

PRECISIONS: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""dtype of the weights of a run of each precision."""


_ZIP, _POINTER = b"PK\x03\x04", b"version https://git-lfs"
"""The first bytes of an archive, and of the pointer that Git LFS leaves in the place of a large file."""


def open_torch_file(
    path: Path,
    *,
    tensors: bool = False,
    owned: Collection[str] | None = None,
    foreign: bool = False,
    summed: bool = False,
) -> dict[str, Any]:
    """Return the object in a checkpoint file.

    Args:
        path: a file that DeepSpeed wrote with ``torch.save``.
        tensors: memory-map the tensors (on the CPU) instead of describing them (on the meta device).
        foreign: read the tensors of an archive that torch didn't write itself, instead of refusing it.
        owned: keys whose values must be all readable; by default all keys. Under other keys, an object of a class that isn't
            allowed becomes `foreign.Opaque`.
        summed: the file's small records have been compared with checksums.

    Raises:
        DamagedCheckpointError: the file is missing, isn't whole, or names a class that isn't allowed.
        UnsupportedError: it is an archive that another program has written anew; see `archives`.
    """
    loaded = open_torch_object(path, tensors=tensors, owned=owned, foreign=foreign, summed=summed)
    if not isinstance(loaded, dict):
        raise DamagedCheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint dictionary")
    return loaded


def open_torch_object(
    path: Path,
    *,
    tensors: bool = False,
    owned: Collection[str] | None = None,
    foreign: bool = False,
    summed: bool = False,
) -> Any:
    """Return the object in a file as `open_torch_file` does, also if it is no dictionary."""
    check_regular(path)
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing; {REMEDY}")
    with telling_damage(path), path.open("rb") as file:
        start = file.read(len(_POINTER))
        # torch requires a whole one from the first byte on
        archive = start.startswith(_ZIP) and zipfile.is_zipfile(file)
    loaded = _unpickled(path, tensors, foreign, summed) if archive else _unpickled_legacy(path, start, tensors)
    for key, value in loaded.items() if isinstance(loaded, dict) else [("the object", loaded)]:
        if owned is not None and isinstance(loaded, dict) and key not in owned:
            continue
        if name := opaque_in(value):
            raise DamagedCheckpointError(refusal(path, name))
        if why := misshapen(value):
            raise DamagedCheckpointError(f"{path} holds something else than DeepSpeed writes as {key!r:.80}: {why}")
    if owned is None and isinstance(loaded, Content):
        raise DamagedCheckpointError(refusal(path, loaded.foreign))
    return loaded


def _unpickled(path: Path, tensors: bool, foreign: bool, summed: bool) -> Any:
    try:
        archive = Archive.of(path, summed)
    except UnsupportedError:
        if not foreign:
            raise
        return _by_list(path, map_location="cpu")
    loaded = _by_list(path, map_location="cpu" if tensors else "meta", mmap=tensors)
    archive.check_storages(loaded)
    return loaded


def _by_list(path: Path, **where: Any) -> Any:
    """Load with the unpickler of `unpickling`. Torch's own would call what it knows with any arguments."""
    with telling_damage(path):
        with path.open("rb", buffering=0) as file, zipfile.ZipFile(file) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("Unsupported class TorchScript")
        if not is_url(path):
            return torch.load(path, weights_only=False, pickle_module=unpickling, **where)
        with path.open("rb", buffering=0) as file:
            return torch.load(file, weights_only=False, pickle_module=unpickling, map_location=where["map_location"])


def _unpickled_legacy(path: Path, start: bytes, tensors: bool) -> Any:
    if start.startswith(pickle.PROTO):
        return _read_legacy(path, tensors)
    if (reason := why_not_read(path)) is not None:
        raise DamagedCheckpointError(f"{path} can't be read: {reason.strerror or reason}")
    kind = "empty" if not start else "truncated" if start.startswith(_ZIP) else "not a torch file"
    if start == _POINTER:
        kind = 'a pointer to a file, which "git lfs pull" would fetch'
    raise DamagedCheckpointError(f"{path} is {kind} ({path.stat().st_size} bytes)")


def _read_legacy(path: Path, tensors: bool) -> Any:
    """Return the object in a file of the older format. Described storages have a ``_checkpoint_offset``, in bytes."""
    storages = _Storages(path, "cpu" if tensors else "meta")
    with telling_damage(path), path.open("rb") as file:
        found, expected = [unpickling.Unpickler(file).load() for _ in range(2)], [MAGIC_NUMBER, PROTOCOL_VERSION]
        if found != expected:
            raise pickle.UnpicklingError(f"begins with {found}, where torch's older format has {expected}")
        system = unpickling.Unpickler(file).load()
        if isinstance(system, Content):
            raise pickle.UnpicklingError(f"Unsupported class {system.foreign}")
        if not system["little_endian"]:
            raise pickle.UnpicklingError("was written by a machine that is big-endian")
        unpickler = unpickling.Unpickler(file)
        unpickler.persistent_load = storages.make
        loaded, keys, start = unpickler.load(), unpickling.Unpickler(file).load(), file.tell()
    storages.place(keys, start, tensors)
    return loaded


class _Storages:
    """The storages of a file, by key."""

    def __init__(self, path: Path, device: str) -> None:
        self._path, self._device = path, device
        self._made: dict[str, TypedStorage] = {}

    def make(self, reference: Any) -> TypedStorage:
        """Return the storage that a pickle refers to."""
        kind, storage_type, key, _, numel, view = reference
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else getattr(storage_type, "dtype", None)
        sound = isinstance(dtype, torch.dtype) and type(numel) is int and numel >= 0
        if kind != "storage" or view is not None or not sound:
            raise pickle.UnpicklingError(f"refers to {reference!r:.100}, which isn't a storage")
        if key not in self._made:
            untyped = torch.UntypedStorage(numel * _element_size(dtype), device=self._device)
            self._made[key] = TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._made[key]

    def place(self, keys: Any, start: int, tensors: bool) -> None:
        """Tell each storage where its bytes are, or read them. They follow ``start`` in the order of the keys."""
        with telling_damage(self._path), self._path.open("rb") as file:
            file_numbytes = numbytes_of(file)
            if sorted(keys) != sorted(self._made):
                raise pickle.UnpicklingError("lists other storages than it refers to")
            for key in keys:
                typed = self._made[key]
                storage = typed._untyped_storage
                file.seek(start)
                numel = int.from_bytes(file.read(8), "little")
                start += 8
                if numel * _element_size(typed.dtype) != storage.nbytes() or start + storage.nbytes() > file_numbytes:
                    raise pickle.UnpicklingError(
                        f"is truncated: storage {key} of {storage.nbytes()} bytes, file of {file_numbytes}"
                    )
                if tensors:
                    file.readinto(torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy())  # type: ignore[attr-defined, call-overload]
                else:
                    storage._checkpoint_offset = start  # type: ignore[attr-defined]
                start += storage.nbytes()


def dtype_of(tensor: torch.Tensor, path: Path) -> str:
    """Return the name of a tensor's dtype.

    Raises:
        UnsupportedError: the dtype is outside the table.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"{path} holds a tensor of {tensor.dtype}, which has no universal form")
    return TORCH_DTYPES[tensor.dtype]


def extent_of(tensor: torch.Tensor, path: Path) -> FileExtent:
    """Return the file range of a tensor from `open_torch_file`.

    Raises:
        UnsupportedError: the tensor isn't contiguous, or of a dtype outside the table.
    """
    dtype = dtype_of(tensor, path)
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)} that isn't contiguous: its elements are in another order than "
            f"row-major, as with channels_last, which DeepSpeed alone can load, on the same topology"
        )
    start = storage_start(tensor) + tensor.storage_offset() * tensor.element_size()
    return FileExtent(str(path), start, dtype, tensor.numel())


def scalar_of(value: Any, path: Path) -> float:
    """Return the number that a Python number or a one-element tensor of `open_torch_file` stands for."""
    return cast(float, read_tensor(value, path).item() if isinstance(value, torch.Tensor) else value)


def read_tensor(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """Read a tensor of `open_torch_file` to the CPU. For the few small tensors that aren't planned."""
    extent = extent_of(tensor, path)
    with path.open("rb") as file:
        file.seek(extent.file_offset)
        raw = bytearray(file.read(tensor.numel() * tensor.element_size()))
    return (
        torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape) if raw else torch.empty_like(tensor, device="cpu")
    )


def read_tensors(value: Any, path: Path) -> Any:
    """Return a value of `open_torch_file` with all tensors in its dictionaries, lists and tuples read."""
    if isinstance(value, torch.Tensor):
        return read_tensor(value, path)
    if isinstance(value, dict):
        return {key: read_tensors(item, path) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(read_tensors(item, path) for item in value)
    return value
