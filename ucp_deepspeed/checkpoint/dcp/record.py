"""The entry that this package adds to a DCP folder that it writes: an index, as that of a universal checkpoint.

DCP has no place for kinds of parameters, tied names, patterns, samples and much else. With this entry nothing is lost on the way.
Other readers of the folder never ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ucp_deepspeed.checkpoint.checkpoint import ParameterGroup, RunState
from ucp_deepspeed.checkpoint.dcp.entries import MISSING_HINT, Entries
from ucp_deepspeed.checkpoint.universal.index import FORMAT_VERSION, Index, are_scalars, decoded, run_state_of
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError

RECORD_KEY = "ucp_deepspeed"


@dataclass(frozen=True)
class Record:
    """The index, and the tensors of the client state."""

    path: Path
    index: Index
    tensors: Mapping[str, torch.Tensor]

    def as_value(self) -> dict[str, Any]:
        """Return the value to save."""
        return {"index": self.index.model_dump_json(), "tensors": dict(self.tensors)}

    @classmethod
    def read(cls, entries: Entries) -> Record | None:
        """Read the entry; None if there is none.

        Raises:
            DamagedCheckpointError: it can't be parsed.
            UnsupportedError: a later version wrote it.
        """
        if RECORD_KEY not in entries.metadata.objects:
            return None
        value, path = entries.value(RECORD_KEY), entries.metadata.path
        try:
            index = Index.model_validate_json(value["index"])
            tensors = {str(key): tensor for key, tensor in value["tensors"].items()}
        except (ValidationError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DamagedCheckpointError(
                f"{path}: entry {RECORD_KEY!r} can't be parsed: {reason}; {MISSING_HINT}"
            ) from error
        if index.format_version > FORMAT_VERSION:
            told = f"{path}: entry {RECORD_KEY!r} has version {index.format_version}; this release reads up to {FORMAT_VERSION}"
            raise UnsupportedError(f"{told}; update ucp_deepspeed")
        return cls(path, index, tensors)

    @property
    def run(self) -> RunState:
        """Return where the run stood."""
        return run_state_of(self.index.run, self.path)

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """Return the parameter groups."""
        held = (
            (group.names, decoded(group.hyperparameters, "hyperparameters", self.path)) for group in self.index.groups
        )
        return tuple(ParameterGroup(*each) for each in held)

    def scalars(self, name: str) -> dict[str, float]:
        """Return the states of a parameter that are one number."""
        return decoded(dict(self.index.parameters[name].scalars), f"{name}.scalars", self.path, sound=are_scalars)

    def values(self, what: str) -> dict[Any, Any]:
        """Return the ``client_state`` or the ``extra_states``."""
        return decoded(getattr(self.index, what), what, self.path, self.tensors)
