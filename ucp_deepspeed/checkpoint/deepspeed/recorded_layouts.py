"""The layouts that a run records as ``universal_checkpoint_info`` in its model_states files.

DeepSpeed's automatic tensor parallelism (AutoTP) does so in every file (DeepSpeed 0.19.8,
``module_inject/layers.py::collect_autotp_universal_checkpoint_info``). Megatron-DeepSpeed records lists of regular expressions,
matched at the beginning of a name (``checkpoint/ds_to_universal.py::merge_tp_slices``): the first kind that fits a name, in the
order of `KINDS`, says how it is cut; a name that no kind fits is cut along dimension 0. Besides, some parameters' rows are the
vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ucp_deepspeed.errors import MismatchError, UnsupportedError, each_or_problem
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.affine import MAP_VERSION, pattern_of_map
from ucp_deepspeed.layout.pattern import Partial, Pattern, Replicate, Shard

MAPS = "affine_map"
REFUSED = "autotp_unsupported_parameter_patterns"
REPLICATED = "tp_replicated_parameter_patterns"
ROW = "parameter_with_row_parallelism_patterns"
INFO = "universal_checkpoint_info"

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
    patterns: dict[str, Pattern] = {_name(key): Replicate() for key in info.get(REPLICATED, ())}
    # For embeddings that are cut, AutoTP records only this.
    patterns |= {_name(key): Shard(1) for key in info.get(ROW, ())}
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


def _name(key: str) -> str:
    """Return the parameter of a key. The key is the name as an escaped regular expression."""
    return re.sub(r"\\(.)", r"\1", key.removeprefix("^").removesuffix("$"))


SUB_PARAMS = "parameter_with_sub_params"
VOCABULARY = "vocabulary_parameter_patterns"

KINDS: Mapping[str, Pattern] = {
    REPLICATED: Replicate(),
    "parameter_to_average_patterns": Partial(),
    "parameter_with_2_sub_params_cat_dim_0": Shard(0, parts=(1, 1)),
}
"""Lists that come before sub-parameters."""

RECORDED = (*KINDS, SUB_PARAMS, VOCABULARY, ROW)
"""Keys of an info. At least one is there if the info tells layouts."""


@dataclass(frozen=True)
class MegatronDeepSpeedInfo:
    """The info of one checkpoint.

    Attributes:
        kinds: list of regular expressions → the pattern of names that they fit; the first that fits counts. Tensors that hold
            several sub-parameters side by side come after `KINDS`, and names that are cut along dimension 1 last.
        vocabulary: expressions for names whose rows are the vocabulary.
        vocabulary_size: its size without padding.
    """

    kinds: tuple[tuple[tuple[str, ...], Pattern], ...]
    vocabulary: tuple[str, ...]
    vocabulary_size: int | None

    @classmethod
    def read(cls, saved: Mapping[str, Any], where: str) -> MegatronDeepSpeedInfo | None:
        """Read the info in a model_states file; None if there is none, or if it is of automatic tensor parallelism.

        Args:
            where: the file, for messages.

        Raises:
            UnsupportedError: it isn't of the form that DeepSpeed knows; says which key.
        """
        info = saved.get(INFO)
        if not isinstance(info, Mapping) or MAPS in info or REFUSED in info or not any(key in info for key in RECORDED):
            return None
        size = info.get("original_vocab_size")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise UnsupportedError(f"{where}: original_vocab_size in {INFO} is {size!r}, not a number of rows")
        for expression, shares in (info.get("sub_param_shard_widths") or {}).items():
            if any(len(set(widths)) > 1 for widths in shares):
                raise UnsupportedError(
                    f"{where}: {INFO} cuts the sub-parameters of {expression!r} unevenly, {shares}; name a spec with heads"
                )
        lists = {key: _expressions(info.get(key) or (), key, where) for key in (*KINDS, ROW, VOCABULARY)}
        kinds = [(lists[key], pattern) for key, pattern in KINDS.items()]
        kinds += [_sub_parameters(entry, where) for entry in info.get(SUB_PARAMS) or ()]
        return cls((*kinds, (lists[ROW], Shard(1))), lists[VOCABULARY], size)

    def patterns(self, local_shapes: Mapping[str, Shape], where: str) -> dict[str, Pattern]:
        """Return the pattern of each parameter.

        Args:
            local_shapes: shapes on some rank; a vector can't be cut along dimension 1.

        Raises:
            MismatchError: the info contradicts itself or can't be expressed; lists the parameters.
        """
        found, problems = each_or_problem(local_shapes, lambda name: self._pattern(name, local_shapes[name]))
        if problems:
            raise MismatchError(f"{INFO} in {where} tells no layout; name a spec", problems)
        return found

    def _pattern(self, name: str, shape: Shape) -> Pattern:
        fitting = (pattern for expressions, pattern in self.kinds if _fits(expressions, name))
        pattern = next(fitting, Shard(0))
        if isinstance(pattern, Shard) and pattern.dim >= len(shape):
            raise ValueError(f"to be cut along dimension {pattern.dim} of the shape {list(shape)}")
        if not _fits(self.vocabulary, name):
            return pattern
        if pattern != Shard(0):
            raise ValueError(f"its rows are the vocabulary, and {pattern} at once")
        return Shard(0, vocabulary=True)


def _fits(expressions: Sequence[str], name: str) -> bool:
    fitting = [expression for expression in expressions if re.match(expression, name)]
    if len(fitting) > 1:
        raise ValueError(f"{len(fitting)} expressions of one list fit it: {', '.join(fitting)}")
    return bool(fitting)


def _expressions(listed: Any, key: str, where: str) -> tuple[str, ...]:
    """Return a list of regular expressions, or refuse an entry that isn't one."""
    found = tuple(listed) if isinstance(listed, (list, tuple)) else (listed,)
    for expression in found:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise UnsupportedError(f"{where}: {expression!r} in {key} of {INFO} is no expression: {error}") from error
    return found


def _sub_parameters(entry: Any, where: str) -> tuple[tuple[str, ...], Pattern]:
    """Read expressions and pattern of one entry, of the form of ``checkpoint/universal_checkpoint.py::SubparamShape``."""
    fields = entry if isinstance(entry, Mapping) else vars(entry) if hasattr(entry, "__dict__") else {}
    patterns, shape, dim = (fields.get(key) for key in ("patterns", "shape", "partition_dim"))
    if not isinstance(shape, (list, tuple)) or not isinstance(dim, int) or not 0 <= dim < len(shape):
        raise UnsupportedError(f"{where}: {SUB_PARAMS} of {INFO} has an entry that this release can't read: {entry!r}")
    parts = shape[dim] if isinstance(shape[dim], (list, tuple)) else (1,) * max(int(shape[dim]), 0)
    grouped = any(isinstance(size, (list, tuple)) for at, size in enumerate(shape) if at != dim)
    if grouped or not parts or any(not isinstance(size, int) or size < 1 for size in parts):
        raise UnsupportedError(f"{where}: {SUB_PARAMS} of {INFO} has a shape that no pattern expresses: {shape!r}")
    unit = gcd(*parts)
    return _expressions(patterns, SUB_PARAMS, where), Shard(dim, parts=tuple(size // unit for size in parts))
