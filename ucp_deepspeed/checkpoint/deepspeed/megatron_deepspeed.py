"""Layouts that Megatron-DeepSpeed records: ``universal_checkpoint_info`` in the model_states files of a checkpoint.

It is lists of regular expressions, matched at the beginning of a name. Semantics as in DeepSpeed 0.19.8,
``checkpoint/ds_to_universal.py::merge_tp_slices``: the first kind that fits a name, in the order of `KINDS`, says how it is cut;
a name that no kind fits is cut along dimension 0. Besides, some parameters' rows are the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from ucp_deepspeed.checkpoint.deepspeed.autotp import MAPS, REFUSED
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.pattern import Partial, Pattern, Replicate, Shard

INFO = "universal_checkpoint_info"

SUB_PARAMS = "parameter_with_sub_params"
VOCABULARY = "vocabulary_parameter_patterns"
ROW_PARALLEL = "parameter_with_row_parallelism_patterns"

KINDS: Mapping[str, Pattern] = {
    "tp_replicated_parameter_patterns": Replicate(),
    "parameter_to_average_patterns": Partial(),
    "parameter_with_2_sub_params_cat_dim_0": Shard(0, parts=(1, 1)),
}
"""Lists that come before sub-parameters."""

RECORDED = (*KINDS, SUB_PARAMS, VOCABULARY, ROW_PARALLEL)
"""Keys of an info. At least one is there if the info tells layouts."""


@dataclass(frozen=True)
class SubParameters:
    """Names of tensors that hold several sub-parameters side by side, and the sizes of these.

    Attributes:
        patterns: regular expressions for the names.
        dim: the dimension along which they lie side by side and are cut.
        parts: relative sizes of the sub-parameters.
    """

    patterns: tuple[str, ...]
    dim: int
    parts: tuple[int, ...]


@dataclass(frozen=True)
class MegatronDeepSpeedInfo:
    """The info of one checkpoint.

    Attributes:
        kinds: list of regular expressions → the pattern of names that they fit; the first that fits counts.
        sub_parameters: see `SubParameters`; they come after ``kinds``.
        row_parallel: expressions for names that are cut along dimension 1; they come last.
        vocabulary: expressions for names whose rows are the vocabulary.
        vocabulary_size: its size without padding.
    """

    kinds: tuple[tuple[tuple[str, ...], Pattern], ...]
    sub_parameters: tuple[SubParameters, ...]
    row_parallel: tuple[str, ...]
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
        return cls(
            kinds=tuple((_expressions(info, key, where), pattern) for key, pattern in KINDS.items()),
            sub_parameters=tuple(_sub_parameters(entry, where) for entry in info.get(SUB_PARAMS) or ()),
            row_parallel=_expressions(info, ROW_PARALLEL, where),
            vocabulary=_expressions(info, VOCABULARY, where),
            vocabulary_size=size,
        )

    def patterns(self, local_shapes: Mapping[str, Shape], where: str) -> dict[str, Pattern]:
        """Return the pattern of each parameter.

        Args:
            local_shapes: shapes on some rank; a vector can't be cut along dimension 1.

        Raises:
            MismatchError: the info contradicts itself or can't be expressed; lists the parameters.
        """
        found: dict[str, Pattern] = {}
        problems: list[str] = []
        for name, shape in local_shapes.items():
            try:
                found[name] = self._pattern(name, shape)
            except ValueError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise MismatchError(f"{INFO} in {where} tells no layout; name a spec", problems)
        return found

    def _pattern(self, name: str, shape: Shape) -> Pattern:
        pattern = self._by_kind(name)
        if isinstance(pattern, Shard) and pattern.dim >= len(shape):
            raise ValueError(f"to be cut along dimension {pattern.dim} of the shape {list(shape)}")
        if not _fits(self.vocabulary, name):
            return pattern
        if pattern != Shard(0):
            raise ValueError(f"its rows are the vocabulary, and {pattern} at once")
        return Shard(0, vocabulary=True)

    def _by_kind(self, name: str) -> Pattern:
        for expressions, pattern in self.kinds:
            if _fits(expressions, name):
                return pattern
        for held in self.sub_parameters:
            if _fits(held.patterns, name):
                return Shard(held.dim, parts=held.parts)
        return Shard(1 if _fits(self.row_parallel, name) else 0)


def _fits(expressions: Sequence[str], name: str) -> bool:
    fitting = [expression for expression in expressions if re.match(expression, name)]
    if len(fitting) > 1:
        raise ValueError(f"{len(fitting)} expressions of one list fit it: {', '.join(fitting)}")
    return bool(fitting)


def _expressions(info: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return a list of regular expressions.

    Raises:
        UnsupportedError: an entry isn't a regular expression; names it.
    """
    return _checked(info.get(key) or (), key, where)


def _checked(listed: Any, key: str, where: str) -> tuple[str, ...]:
    found = tuple(listed) if isinstance(listed, (list, tuple)) else (listed,)
    for expression in found:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise UnsupportedError(f"{where}: {expression!r} in {key} of {INFO} is no expression: {error}") from error
    return found


def _sub_parameters(entry: Any, where: str) -> SubParameters:
    """Read one entry, of the form of ``checkpoint/universal_checkpoint.py::SubparamShape``.

    Raises:
        UnsupportedError: it has other keys, or sizes that can't be expressed.
    """
    fields = entry if isinstance(entry, Mapping) else vars(entry) if hasattr(entry, "__dict__") else {}
    patterns, shape, dim = (fields.get(key) for key in ("patterns", "shape", "partition_dim"))
    if not isinstance(shape, (list, tuple)) or not isinstance(dim, int) or not 0 <= dim < len(shape):
        raise UnsupportedError(f"{where}: {SUB_PARAMS} of {INFO} has an entry that this release can't read: {entry!r}")
    parts = shape[dim] if isinstance(shape[dim], (list, tuple)) else (1,) * max(int(shape[dim]), 0)
    grouped = any(isinstance(size, (list, tuple)) for at, size in enumerate(shape) if at != dim)
    if grouped or not parts or any(not isinstance(size, int) or size < 1 for size in parts):
        raise UnsupportedError(f"{where}: {SUB_PARAMS} of {INFO} has a shape that no pattern expresses: {shape!r}")
    unit = gcd(*parts)
    return SubParameters(_checked(patterns, SUB_PARAMS, where), dim, tuple(size // unit for size in parts))
