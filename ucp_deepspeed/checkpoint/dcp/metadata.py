"""The file ``.metadata`` of a DCP folder: which chunks of which tensors lie where. It is a pickle, and is read without its code.

torch makes it in ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``. Each class in it has a stand-in here, which
only keeps attributes; anything else in the file is refused.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ucp_deepspeed.checkpoint.bounds import check_inside, check_plain, read_bounded
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.unpickling import PATHS, Unpickler
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Box, Shape

METADATA_NAME = ".metadata"
FILES_ENDING = ".distcp"

MOST_NUMBYTES = 1 << 30
"""Most bytes of the file: four million chunks have about half of that."""

TRUST_HINT = "if you trust it, load it with torch.distributed.checkpoint.load, and save it again without that object"


class _Kept:
    """Stands in for a class of torch's: attributes only."""


class _Metadata(_Kept): ...


class _Tensor(_Kept): ...


class _Bytes(_Kept): ...


class _Chunk(_Kept): ...


class _StorageInfo(_Kept): ...


class _StorageMeta(_Kept): ...


class _SavePlan(_Kept): ...


class _WriteItem(_Kept): ...


class _WriteData(_Kept): ...


class _Properties(_Kept):
    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _Index(_Kept):
    """Key of an entry. Two are the same if tensor and place are."""

    fqn: Any = None
    offset: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))


class _MemoryFormat(enum.Enum):
    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


class _WriteItemType(enum.Enum):
    TENSOR = 1
    SHARD = 2
    BYTE_IO = 3


def _member(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``, with which Python 3.11.2 pickles an enum's members."""
    if owner not in (_MemoryFormat, _WriteItemType) or name not in owner.__members__:
        raise pickle.UnpicklingError("Unsupported class getattr")
    return owner[name]


_TORCHS = "torch.distributed.checkpoint"
_MEGATRONS = "megatron.core.dist_checkpointing.strategies.torch"
_OLDER = "torch.distributed._shard.sharded_tensor.metadata"  # up to 2.2

ALLOWED: dict[str, Any] = {
    f"{_TORCHS}.metadata.Metadata": _Metadata,
    f"{_TORCHS}.metadata.TensorStorageMetadata": _Tensor,
    f"{_TORCHS}.metadata.BytesStorageMetadata": _Bytes,
    f"{_TORCHS}.metadata.ChunkStorageMetadata": _Chunk,
    f"{_TORCHS}.metadata.TensorProperties": _Properties,
    f"{_TORCHS}.metadata._MEM_FORMAT_ENCODING": _MemoryFormat,
    f"{_TORCHS}.metadata.MetadataIndex": _Index,
    f"{_TORCHS}.metadata.StorageMeta": _StorageMeta,
    f"{_TORCHS}.filesystem._StorageInfo": _StorageInfo,
    f"{_TORCHS}.planner.SavePlan": _SavePlan,  # Megatron-Core keeps the plans of all ranks
    f"{_TORCHS}.planner.WriteItem": _WriteItem,
    f"{_TORCHS}.planner.WriteItemType": _WriteItemType,
    f"{_TORCHS}.planner.TensorWriteData": _WriteData,
    f"{_TORCHS}.planner.BytesIOWriteData": _WriteData,
    f"{_MEGATRONS}.MCoreMetadata": _Metadata,  # of 0.15
    f"{_MEGATRONS}.MCoreSavePlan": _SavePlan,
    f"{_OLDER}.TensorProperties": _Properties,
    f"{_OLDER}.MEM_FORMAT_ENCODING": _MemoryFormat,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": str,
    "builtins.getattr": _member,
    **{f"torch.{name}": found for name, found in vars(torch).items() if isinstance(found, torch.dtype)},
    **{f"{home}.{path.__name__}": path for path in PATHS for home in ("pathlib", "pathlib._local")},
}
"""All that the file may name, by module and name, and what stands in for it."""


class _Unpickler(Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.known = ALLOWED
        self.names = {id(found): full.removeprefix("builtins.") for full, found in ALLOWED.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for a class."""
        if (full := f"{module}.{name}") not in ALLOWED:
            raise _ForeignError(full)
        return ALLOWED[full]

    def made(self, make: Any, args: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call what is on the list. Nothing there runs more than its own few lines, so that nothing has to be noted of a call."""
        if id(make) not in self.names or kwargs:
            raise pickle.UnpicklingError(f"calls a {type(make).__name__}")
        return make(*args)


class _ForeignError(Exception):
    """The file names a class that it may not."""


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of an entry: file, first byte, and number of bytes."""

    file_name: str
    start: int
    numbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor. ``chunks`` maps each box that isn't empty to the part that holds it."""

    dtype: torch.dtype
    shape: Shape
    chunks: Mapping[Box, Part]


@dataclass(frozen=True)
class Metadata:
    """The content of the file, checked.

    Attributes:
        path: of the file.
        tensors: by key. A key is a path in the state that was saved, joined by dots.
        objects: everything else that was saved, by key.
        paths: the path of each key; a key whose path isn't recorded has itself.
        has_paths: whether paths are recorded, as torch's planner does.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Part]
    paths: Mapping[str, tuple[str | int, ...]]
    has_paths: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The files, and how many bytes each has at least."""
        found: dict[str, int] = {}
        for part in (
            *self.objects.values(),
            *(part for held in self.tensors.values() for part in held.chunks.values()),
        ):
            found[part.file_name] = max(found.get(part.file_name, 0), part.start + part.numbytes)
        return found


def read_metadata(path: Path) -> Metadata:
    """Read the file.

    Raises:
        DamagedCheckpointError: it is missing, isn't whole, contradicts itself, or names a class that it may not.
        UnsupportedError: chunks were written by way of an extension of torch's.
    """
    check_inside(path)
    content = read_bounded(path, MOST_NUMBYTES)
    try:
        loaded = _Unpickler(io.BytesIO(content)).load()
    except _ForeignError as error:
        told = f"{path} names {error}, which isn't part of a checkpoint's metadata and could run code"
        raise DamagedCheckpointError(f"{told}; {TRUST_HINT}") from error
    except RecursionError as error:
        raise DamagedCheckpointError(f"{path} has too many values inside others; {REMEDY}") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpointError(f"{path} can't be read ({len(content)} bytes): {reason}; {REMEDY}") from error
    return _Reading(path).read(loaded)


class _Reading:
    """Checks of what was unpickled: every attribute may be anything, or missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, loaded: Any) -> Metadata:
        held, places = (getattr(loaded, name, None) for name in ("state_dict_metadata", "storage_data"))
        if not isinstance(loaded, _Metadata) or not isinstance(held, dict) or not isinstance(places, dict):
            self.refuse("isn't the metadata of a checkpoint")
        tensors: dict[str, StoredTensor] = {}
        objects: dict[str, Part] = {}
        for key, entry in held.items():
            if not isinstance(key, str):
                self.refuse(f"has the key {key!r:.80}, which is no text")
            if isinstance(entry, _Tensor):
                tensors[key] = self.tensor(key, entry, places)
            elif isinstance(entry, _Bytes):
                objects[key] = self.part(key, None, places)
            else:
                self.refuse(f"holds a {type(entry).__name__} as {key!r:.80}")
        recorded = self.paths(getattr(loaded, "planner_data", None))
        paths = {key: recorded.get(key, (key,)) for key in held}
        return Metadata(self.path, tensors, objects, paths, not recorded.keys().isdisjoint(held))

    def tensor(self, key: str, entry: Any, places: Mapping[Any, Any]) -> StoredTensor:
        dtype = getattr(getattr(entry, "properties", None), "dtype", None)
        shape, chunks = self.size(key, getattr(entry, "size", None)), getattr(entry, "chunks", None)
        if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
            self.refuse(f"describes {key!r:.80} without a type or chunks")
        found: dict[Box, Part] = {}
        for chunk in chunks:
            start, sizes = (self.size(key, getattr(chunk, name, None)) for name in ("offsets", "sizes"))
            if len(start) != len(shape) or len(sizes) != len(shape):
                self.refuse(f"has a chunk of {key!r:.80} with other dimensions than the tensor")
            if 0 not in sizes:
                stop = tuple(low + size for low, size in zip(start, sizes, strict=True))
                found[Box(start, stop)] = self.part(key, torch.Size(start), places)
        return StoredTensor(dtype, shape, found)

    def size(self, key: str, held: Any) -> Shape:
        if not isinstance(held, torch.Size) or any(extent < 0 for extent in held):
            self.refuse(f"has no size, or a negative one, in {key!r:.80}")
        return tuple(held)

    def part(self, key: str, offset: torch.Size | None, places: Mapping[Any, Any]) -> Part:
        """Return where an entry lies; ``offset``: begin of the chunk of a tensor."""
        index = _Index()
        index.fqn, index.offset = key, offset
        place = places.get(index)
        at = f"{key!r:.80}" + ("" if offset is None else f", chunk at {tuple(offset)}")
        if not isinstance(place, _StorageInfo):
            self.refuse(f"doesn't say in which file {at} lies")
        told = ("relative_path", "offset", "length", "transform_descriptors")
        name, start, numbytes, transforms = (getattr(place, each, None) for each in told)
        if transforms:
            by = f"{self.path.parent / str(name)} holds {at} as extensions of torch's have written it ({transforms!r:.80})"
            raise UnsupportedError(f"{by}; save it again without them")
        try:
            plain = check_plain(name if isinstance(name, str) else "")
        except ValueError as error:
            self.refuse(f"puts {at} elsewhere: {error}")
        if type(start) is not int or type(numbytes) is not int or start < 0 or numbytes < 0:
            self.refuse(f"puts {at} at byte {start!r:.40}, with {numbytes!r:.40} bytes")
        return Part(plain, start, numbytes)

    def paths(self, data: Any) -> dict[str, tuple[str | int, ...]]:
        """Return the paths that torch's planner records (``planner_data``); other planners record other things."""
        if not isinstance(data, dict):
            return {}
        return {
            key: path
            for key, path in data.items()
            if isinstance(path, tuple)
            and all(isinstance(each, str | int) for each in path)
            and ".".join(map(str, path)) == key
        }

    def refuse(self, told: str) -> NoReturn:
        raise DamagedCheckpointError(f"{self.path} {told}; {REMEDY}")
