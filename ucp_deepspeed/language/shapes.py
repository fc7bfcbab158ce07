"""Whole shapes in rules: dimensions without a value get theirs from the parameters, and then all must agree.

dimensions: {hidden: null, ffn: null}
rules:
  - {match: layers.*.up.weight, pattern: shard, dim: 0, shape: [ffn, hidden]}
  - {match: layers.*.gate_up.weight, pattern: shard, dim: 0, parts: [1, 1], shape: [2 * ffn, hidden]}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp_deepspeed.language.dimensions import evaluate
from ucp_deepspeed.layout.box import Shape

StatedShape = tuple[int | str | None, ...]
"""A shape that a rule states: numbers, expressions, and None for an extent that the rule leaves open."""


@dataclass(frozen=True)
class ShapeCheck:
    """Result of comparing stated shapes with found ones.

    Attributes:
        values: values of dimensions that the parameters gave.
        problems: parameter → how its shape differs.
        confirmed: parameters with some stated extent that agrees with another parameter's, or with a given number.
    """

    values: Mapping[str, int]
    problems: Mapping[str, str]
    confirmed: frozenset[str]


def check_shapes(
    stated: Mapping[str, StatedShape],
    found: Mapping[str, Shape],
    given: Mapping[str, int],
    free_dims: Mapping[str, Any],
) -> ShapeCheck:
    """Compare the shapes that rules state with whole shapes.

    A free dimension gets the value that most parameters give it; the others are then the wrong ones.

    Args:
        stated: parameter → the shape in its rule.
        found: parameter → its whole shape; parameters without one are left out.
        given: dimensions that have a value.
        free_dims: names of dimensions that have none.
    """
    problems: dict[str, str] = {}
    votes: dict[str, Counter[int]] = {name: Counter() for name in free_dims}
    fitting: dict[str, tuple[StatedShape, Shape]] = {}
    for name, shape in stated.items():
        if name not in found:
            continue
        if len(shape) != len(found[name]):
            problems[name] = f"has {len(found[name])} dimensions, and the rule states {_words(shape)}"
            continue
        fitting[name] = shape, found[name]
        for item, extent in zip(shape, found[name], strict=True):
            if isinstance(item, str) and item in votes:
                votes[item][extent] += 1
    solved = {name: counts.most_common(1)[0][0] for name, counts in votes.items() if counts}
    values = {**given, **solved}
    confirmed: set[str] = set()
    expected_of = {
        shape: [_extent(item, values) for item in shape] for shape in {shape for shape, _ in fitting.values()}
    }
    for name, (shape, extents) in fitting.items():
        expected = expected_of[shape]
        wrong = [one for one, extent in zip(expected, extents, strict=True) if one is not None and one != extent]
        if wrong:
            means = f", which is {_words(expected)}" if any(isinstance(item, str) for item in shape) else ""
            problems[name] = f"the rule states {_words(shape)}{means}"
        elif any(_tells(item, extent, votes) for item, extent in zip(shape, expected, strict=True)):
            confirmed.add(name)
    return ShapeCheck(solved, problems, frozenset(confirmed))


def _extent(item: int | str | None, values: Mapping[str, int]) -> int | None:
    """Return a stated number; None if dimensions in it have no value."""
    if not isinstance(item, str):
        return item
    try:
        return evaluate(item, values)
    except ValueError:
        return None


def _tells(item: int | str | None, extent: int | None, votes: Mapping[str, Counter[int]]) -> bool:
    """Return whether an extent could have disagreed. It couldn't if no other extent gave its dimension a value."""
    if isinstance(item, str) and item in votes:
        return votes[item].total() > 1
    return extent is not None


def _words(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if item is None else str(item) for item in shape)}]"
