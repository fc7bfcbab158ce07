"""Errors of torch, pickle and zipfile about a file, told as damage.

A bug of this package would look the same, so the blocks of `telling_damage` hold as little of its code as can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import BadZipFile

from ucp_deepspeed.checkpoint.torch_files.unpickling import CODE_MODULES
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError, why_not_read

REMEDY = (
    "fetch the file again from where it is whole, or take another tag: ucp verify --all FOLDER tells which are whole"
)


@contextmanager
def telling_damage(path: Path) -> Iterator[None]:
    """Raise what the block raises about a file as a DamagedCheckpointError: damage has no kinds of errors of its own."""
    try:
        yield
    except MemoryError as error:
        raise UnsupportedError(f"{path} needs more memory than there is") from error
    except Exception as error:
        if (reason := why_not_read(path, error)) is not None:
            raise DamagedCheckpointError(f"{path} can't be read: {reason.strerror or reason}") from error
        raise DamagedCheckpointError(_explain(path, error)) from error


def _explain(path: Path, error: Exception) -> str:
    foreign = re.search(
        r"GLOBAL (\S+) (?:was not an allowed global|whose module)|[Uu]nsupported (?:global|class) ([^\s,]+)", str(error)
    )
    if foreign:
        return refusal(path, foreign.group(1) or foreign.group(2))
    refused = re.search(r"WeightsUnpickler error: *(\S.*)", str(error))
    reason = refused.group(1) if refused else (str(error).strip().splitlines() or [type(error).__name__])[0]
    remedy = f"; {REMEDY}" if isinstance(error, BadZipFile) else ""
    with suppress(OSError):
        return f"{path} can't be read ({path.stat().st_size} bytes): {reason}{remedy}"
    return f"{path} can't be read: {reason}{remedy}"


def refusal(path: Path, name: str) -> str:
    """Return the message for a file that holds an object of a class that isn't allowed."""
    refused = f"{path} holds an object of class {name}, which could run code when loaded and is refused"
    module, _, kind = name.rpartition(".")
    if module in ("", "builtins", "numpy") or module.partition(".")[0] in CODE_MODULES:
        return refused
    return f"{refused}; if you trust it, allow it with torch.serialization.add_safe_globals([{kind}]) before loading"
