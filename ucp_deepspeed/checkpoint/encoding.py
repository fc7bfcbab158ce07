"""Python values as exact JSON (`docs/format.md`, *Values*), their comparison, and the reading of index and manifest."""

from __future__ import annotations

import base64
import json
import math
import pickle
import re
import reprlib
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import pydantic_core
import torch
from pydantic import BaseModel, ValidationError
from xxhash import xxh3_64_hexdigest

from ucp_deepspeed.checkpoint.bounds import read_bounded
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES, TORCH_DTYPES
from ucp_deepspeed.checkpoint.torch_files.unpickling import given_fraction
from ucp_deepspeed.errors import DamagedCheckpointError, FormatError, UnsupportedError, worded

_COLLECTIONS: Mapping[str, type[Any]] = {"": list, "$tuple": tuple, "$set": set, "$frozenset": frozenset}
"""Collections by their tags. Lists need none in JSON."""

_PLAIN: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "decimal": (Decimal, str, Decimal),
    "fraction": (Fraction, str, given_fraction),
    "uuid": (UUID, str, UUID),
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "slice": (slice, lambda value: [value.start, value.stop, value.step], lambda parts: slice(*parts)),
    "deque": (deque, lambda value: [list(value), value.maxlen], lambda parts: deque(*parts)),
    "path": (type(Path()), str, Path),
    "pure_path": (PurePosixPath, str, PurePosixPath),
    "windows_path": (PureWindowsPath, str, PureWindowsPath),
}
"""Plain values of the standard library, by name: class, function to a value that has a form, and function back."""

Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, form: type[Document], what: str, newest: int) -> Document:
    """Read a JSON file of a given form; see `parse_document`."""
    return parse_document(read_bounded(path), path, form, what, newest)


def parse_document(content: bytes, path: Path, form: type[Document], what: str, newest: int) -> Document:
    """Parse JSON of a given form.

    Args:
        path: the file that it is from, for messages.
        what: ``an index`` or ``a manifest``, for messages.
        newest: the highest ``format_version`` that this release reads.

    Raises:
        DamagedCheckpointError: it isn't JSON, or lacks a key, or a value is of another type.
        FormatError: a later version wrote it.
    """
    with suppress(ValidationError):  # the slower way below tells more
        document = form.model_validate_json(content, strict=True)
        if "format_version" in document.model_fields_set and 1 <= getattr(document, "format_version", 0) <= newest:
            return document
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is not {what}: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int:
        raise DamagedCheckpointError(f"{path} is not {what}: format_version must be an integer, found {version!r}")
    if not 1 <= version <= newest:
        raise FormatError(f"{path} has format version {version}; this release reads up to {newest}")
    try:
        return form.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [f"{'.'.join(map(str, item['loc']))}: {worded(item)}" for item in found[:3]]
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise DamagedCheckpointError(f"{path} is not {what}: {'; '.join(problems)}{more}") from error


_SUM = re.compile(rb'"sum": "([0-9a-f]{16})"(?=\n}\s*$)')


def with_sum(text: str) -> str:
    """Return the text of an object in JSON, over several lines, with one more key: ``sum``, the sum of the text with an empty
    one (`has_its_sum`)."""
    start, end = text.removesuffix("\n}") + ',\n "sum": "', '"\n}'
    return f"{start}{xxh3_64_hexdigest(f'{start}{end}'.encode())}{end}"


def has_its_sum(text: bytes) -> bool | None:
    """Return whether a text of `with_sum` has the sum that stands in it; None if none does."""
    found = _SUM.search(text)
    if found is None:
        return None
    rest = text[: found.start(1)] + text[found.end(1) :]
    return xxh3_64_hexdigest(rest).encode() == found[1]


def encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Encode a value as JSON.

    Args:
        place: the value's name, for messages and for the names of tensors in it.
        tensors: receives the tensors in the value, by place.

    Raises:
        UnsupportedError: a value of a type that has no form; names its place.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    for tag, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            items = [encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
            return {tag: items} if tag else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, f"{place}.{key}", tensors) for key, item in value.items()}
        pairs = enumerate(value.items())
        return {"$dict": [[encode(k, place, tensors), encode(v, f"{place}[{i}]", tensors)] for i, (k, v) in pairs]}
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach()
        return {"$tensor": place}
    if isinstance(value, torch.dtype) and value in TORCH_DTYPES:
        return {"$dtype": TORCH_DTYPES[value]}
    for name, (plain, say, _) in _PLAIN.items():
        if type(value) is plain:
            return {"$plain": [name, encode(say(value), place, tensors)]}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    found = f"{type(value).__module__}.{type(value).__qualname__}"
    raise UnsupportedError(f"{place} is a {found}, which has no universal form")


def check_encoded(encoded: Any, place: str) -> None:
    """Raise an UnsupportedError if the result of `encode` holds a string without a UTF-8 form, or is nested too deeply."""
    try:
        pydantic_core.from_json(json.dumps([[[[encoded]]]], ensure_ascii=False).encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{place} holds a string that UTF-8 can't write: {error.object[:40]!r}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{place} has no universal form: {error}") from error


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that `encode` was given; raise a DamagedCheckpointError for an unknown tag or a missing tensor."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    [(tag, content)] = value.items()
    try:
        return _decode_tagged(tag, content, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError, pickle.UnpicklingError) as error:
        shown = reprlib.repr(content)
        raise DamagedCheckpointError(f"the index holds a value that can't be decoded: {tag} {shown}") from error


def _decode_tagged(tag: str, content: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    match tag:
        case "$tuple" | "$set" | "$frozenset":
            return _COLLECTIONS[tag](decode(item, tensors) for item in content)
        case "$float":
            return float(content)
        case "$dict":
            return {decode(key, tensors): decode(item, tensors) for key, item in content}
        case "$tensor":
            return tensors[content]
        case "$dtype":
            return NAMED_DTYPES[content]
        case "$bytes":
            return base64.b64decode(content)
        case "$plain":
            name, said = content
            return _PLAIN[name][2](decode(said, tensors))
    raise ValueError(f"unknown tag {tag}")


def same_value(a: Any, b: Any) -> bool:
    """Return whether two state dict values mean the same: NaN equals itself, 0.0 isn't -0.0, 1 is 1.0, a list equals a tuple.

    Tensors without data (on the meta device) can't be compared, and count as different.
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        if a != b:
            return a != a and b != b
        return a != 0 or math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
            return False
        return torch.equal(*(side.detach().cpu().contiguous().flatten().view(torch.uint8) for side in (a, b)))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(one, other) for one, other in zip(a, b, strict=True))
    if isinstance(a, (np.ndarray, np.generic)) and isinstance(b, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and same_value(a.tolist(), b.tolist())
    if isinstance(a, torch.Tensor | np.ndarray) or isinstance(b, torch.Tensor | np.ndarray):
        return False
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):  # a value whose comparison isn't one answer
        return a is b
