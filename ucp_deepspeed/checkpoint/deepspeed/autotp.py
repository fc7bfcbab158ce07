"""The layouts that DeepSpeed's automatic tensor parallelism (AutoTP) records in every model_states file.

Keys: DeepSpeed 0.19.8, ``module_inject/layers.py::collect_autotp_universal_checkpoint_info``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.affine import MAP_VERSION, pattern_of_map
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard

MAPS = "affine_map"
REFUSED = "autotp_unsupported_parameter_patterns"
REPLICATED = "tp_replicated_parameter_patterns"
ROW = "parameter_with_row_parallelism_patterns"

FIRST_RECORDED = "0.19.7"
"""First version of DeepSpeed whose AutoTP records layouts."""

AUTOTP_FAMILIES = "hf_"
"""Prefix of the names of families whose models AutoTP cuts."""


@dataclass(frozen=True)
class RecordedLayouts:
    """The layouts that a run has recorded.

    Attributes:
        patterns: patterns by name.
        logical_shapes: shapes of whole parameters, by name.
        refused: name → why its layout can't be told, by DeepSpeed or here.
    """

    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    logical_shapes: Mapping[str, Shape] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def read_autotp_layouts(info: Any, degree: int, place: Path | str) -> RecordedLayouts:
    """Return the layouts that AutoTP has recorded; none if it didn't run, or on one rank, where nothing is cut.

    Args:
        info: ``universal_checkpoint_info`` of a model_states file.
        degree: tensor-parallel size.
        place: the file, for messages.

    Raises:
        UnsupportedError: the maps are of another version.
    """
    if not isinstance(info, Mapping) or REFUSED not in info or degree == 1:
        return RecordedLayouts()
    maps = info.get(MAPS) or {"version": MAP_VERSION, "params": {}}
    if maps.get("version") != MAP_VERSION:
        raise UnsupportedError(
            f"{place}: affine maps of version {maps.get('version')}; this release reads version {MAP_VERSION}. Name a spec, or "
            f"use a later release"
        )
    patterns: dict[str, Pattern] = {name: Replicate() for name in _names(info.get(REPLICATED, ()))}
    # For embeddings that are cut, AutoTP records only this.
    patterns |= {name: Shard(1) for name in _names(info.get(ROW, ()))}
    shapes: dict[str, Shape] = {}
    refused = {_name(key): str(reason) for key, reason in info[REFUSED].items()}
    for key, entry in maps["params"].items():
        name = _name(key)
        try:
            patterns[name] = pattern_of_map(entry)
            shapes[name] = tuple(entry["logical_shape"])
        except ValueError as error:
            refused[name] = str(error)
    patterns = {name: found for name, found in patterns.items() if name not in refused}
    # ZeRO-3 may have cut the parameters that AutoTP leaves alone before AutoTP looked at them.
    return RecordedLayouts(patterns, {name: shape for name, shape in shapes.items() if 0 not in shape}, refused)


def before_records(ds_version: str) -> bool:
    """Return whether AutoTP of a DeepSpeed version records nothing. A version that can't be told counts as old."""
    try:
        return Version(ds_version.split("+")[0]) < Version(FIRST_RECORDED)
    except InvalidVersion:
        return True


def _names(keys: Collection[str]) -> list[str]:
    return [_name(key) for key in keys]


def _name(key: str) -> str:
    """Return the parameter of a key. The key is the name as an escaped regular expression."""
    return re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))
