"""The classes that pickles of a checkpoint may name: plain data, and four classes of DeepSpeed, replaced by stand-ins."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import pickle
import types
import uuid
from dataclasses import dataclass
from pathlib import PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

from torch.torch_version import TorchVersion


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
    """Stands in for ``getattr``, with which Python 3.11.2 pickles an enum's members. It finds only members of `ZeroStage`."""
    if owner is not ZeroStage or name not in ZeroStage.__members__:
        raise pickle.UnpicklingError(
            f"Unsupported global: GLOBAL getattr was not an allowed global ({name} of {owner})"
        )
    return ZeroStage[name]


PATHS = PosixPath, PurePosixPath, PureWindowsPath
"""Path classes; Python 3.13 pickles them from another module."""

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
    *((kind, f"builtins.{kind.__name__}") for kind in (list, dict, set, tuple, bool, int, float, str, complex, slice)),
    *(argparse.Namespace, types.SimpleNamespace, TorchVersion),
    *((path, f"{home}.{path.__name__}") for path in PATHS for home in ("pathlib", "pathlib._local")),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID, uuid.SafeUUID),
    *(collections.deque, collections.defaultdict),
]
"""All classes that a checkpoint may name beyond torch's own: data without behaviour, and stand-ins for the rest."""

ALLOWED: dict[str, Any] = {
    name: kind
    for kind, name in (
        each if isinstance(each, tuple) else (each, f"{each.__module__}.{each.__qualname__}")
        for each in ALLOWED_CLASSES
    )
}
"""`ALLOWED_CLASSES` by name."""
