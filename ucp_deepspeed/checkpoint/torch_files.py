"""Opening ``torch.save`` files without running their code and without reading their tensors.

Tensors come back on the meta device; where their bytes lie in the file is kept on their storage (``torch.load`` records it when
``map_location="meta"``), so that one reader serves these files and safetensors alike.
"""

from __future__ import annotations

import argparse
import datetime
import enum
import pickle
import re
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, cast

import numpy as np
import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent, Precision
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError

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

PRECISIONS: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
"""dtype of the weights of a run of each precision."""


class LossScaler:
    """Stands in for DeepSpeed's class of this name: attributes only."""


class DynamicLossScaler(LossScaler):
    """Stands in for DeepSpeed's class of this name: attributes only."""


@dataclass
class FragmentAddress:
    """Stands in for DeepSpeed's ``fragment_address``."""

    numel: int
    start: int


class ZeroStage(enum.IntEnum):
    """Stands in for DeepSpeed's ``ZeroStageEnum``."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


def zero_stage_by_name(owner: type, name: str) -> ZeroStage:
    """Stands in for ``getattr``, by which Python 3.11.2 pickles an enum's members; finds only those of `ZeroStage`."""
    if owner is not ZeroStage or name not in ZeroStage.__members__:
        raise pickle.UnpicklingError(
            f"Unsupported global: GLOBAL getattr was not an allowed global ({name} of {owner})"
        )
    return ZeroStage[name]


NUMPY_MAKERS: list[Any] = [np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
"""The functions by which arrays and scalars are unpickled."""

NUMPY_CLASSES: list[Any] = [
    *(np.ndarray, np.dtype),
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    *((make, f"numpy.{core}.multiarray.{make.__name__}") for make in NUMPY_MAKERS for core in ("core", "_core")),
]
"""Arrays and scalars of numpy, but for those that hold Python objects."""

ALLOWED_CLASSES: list[Any] = [
    (LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (FragmentAddress, "deepspeed.runtime.bf16_optimizer.fragment_address"),  # up to 0.7.2
    (ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (zero_stage_by_name, "builtins.getattr"),
    (frozenset, "builtins.frozenset"),
    (range, "builtins.range"),
    (bytes, "builtins.bytes"),
    *(argparse.Namespace, types.SimpleNamespace, PosixPath, PurePosixPath),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *NUMPY_CLASSES,
]
"""All that a checkpoint may name beyond torch's own classes: data without behaviour, and stand-ins for the rest."""


UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    OSError,
)
"""What ``torch.load`` raises for a file that is damaged or refused."""


def open_torch_file(path: Path, *, tensors: bool = False) -> dict[str, Any]:
    """The object in a checkpoint file.

    Args:
        path: a file that DeepSpeed wrote with ``torch.save``.
        tensors: memory-map the tensors (on the CPU) instead of describing them (on the meta device).

    Raises:
        DamagedCheckpointError: the file is missing, isn't a whole zip archive, or names a class outside `ALLOWED_CLASSES`.
        UnsupportedError: the file was written with ``"checkpoint_serialization": false``.
    """
    if not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing")
    if not zipfile.is_zipfile(path):
        _refuse_other_formats(path)
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            loaded = torch.load(path, map_location="cpu" if tensors else "meta", mmap=tensors, weights_only=True)
    except UNREADABLE as error:
        raise DamagedCheckpointError(_explain(path, error)) from error
    if not isinstance(loaded, dict):
        raise DamagedCheckpointError(f"{path} holds a {type(loaded).__name__}, not a checkpoint dictionary")
    return loaded


def _refuse_other_formats(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        raise UnsupportedError(
            f"{path} is in torch's legacy format, which can't be memory-mapped: it was saved with "
            f'"checkpoint": {{"checkpoint_serialization": false}}; save again without that setting'
        )
    kind = "empty" if not start else "truncated" if start == b"PK\x03\x04" else "not a torch file"
    raise DamagedCheckpointError(f"{path} is {kind} ({path.stat().st_size} bytes)")


def _explain(path: Path, error: Exception) -> str:
    foreign = re.search(
        r"GLOBAL (\S+) (?:was not an allowed global|whose module)|[Uu]nsupported (?:global|class) (\S+)", str(error)
    )
    if foreign:
        name = foreign.group(1) or foreign.group(2)
        refused = f"{path} holds an object of class {name}, which could run code when loaded and is refused"
        if "." not in name:  # a builtin, such as eval
            return refused
        allowed = f"torch.serialization.add_safe_globals([{name.rsplit('.', 1)[-1]}])"
        return f"{refused}; if you trust it, allow it with {allowed} before loading"
    refusal = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
    reason = refusal.group(1) if refusal else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{path} can't be read ({path.stat().st_size} bytes): {reason}"


def dtype_of(tensor: torch.Tensor, path: Path) -> str:
    """Name of a tensor's dtype.

    Raises:
        UnsupportedError: it is outside the table.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise UnsupportedError(f"{path} holds a tensor of {tensor.dtype}, which has no universal form")
    return TORCH_DTYPES[tensor.dtype]


def extent_of(tensor: torch.Tensor, path: Path) -> FileExtent:
    """Where the bytes of a tensor from `open_torch_file` lie.

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


def storage_start(tensor: torch.Tensor) -> int:
    """Where in its file the storage of a tensor from `open_torch_file` begins, in bytes; views share one."""
    start: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", 0)
    return start


def scalar_of(value: Any, path: Path) -> float:
    """The number that a Python number or a one-element tensor of `open_torch_file` stands for."""
    return cast(float, read_tensor(value, path).item() if isinstance(value, torch.Tensor) else value)


def read_tensor(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """The tensor, on the CPU, that one of `open_torch_file` describes; for the few small ones that aren't planned."""
    extent = extent_of(tensor, path)
    with path.open("rb") as file:
        file.seek(extent.file_offset)
        raw = bytearray(file.read(tensor.numel() * tensor.element_size()))
    return (
        torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape) if raw else torch.empty_like(tensor, device="cpu")
    )


def read_tensors(value: Any, path: Path) -> Any:
    """A value of `open_torch_file` with all tensors in its dictionaries, lists and tuples read."""
    if isinstance(value, torch.Tensor):
        return read_tensor(value, path)
    if isinstance(value, dict):
        return {key: read_tensors(item, path) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(read_tensors(item, path) for item in value)
    return value
