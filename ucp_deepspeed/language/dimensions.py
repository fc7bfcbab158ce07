"""Dimensions of a model: numbers with names, and arithmetic on them (``docs/language.md``).

An expression holds integers, names of dimensions, ``+ - * //`` and parentheses, and nothing else.
"""

from __future__ import annotations

import ast
import json
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ucp_deepspeed import tunables
from ucp_deepspeed.layout.box import Shape

LONGEST_EXPRESSION = 200
"""Most characters of an expression. Longer text isn't arithmetic on a few dimensions."""

LARGEST = 2**63 - 1
"""The largest dimension of a tensor."""

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class FromConfig(BaseModel):
    """A dimension from the model's own configuration, a JSON file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Annotated[
        str, Field(description="Key in the file that 'config' names; parts of a nested key are joined by dots.")
    ]
    default: Annotated[
        Annotated[int, Field(strict=True, gt=0)] | str | None,
        Field(description="Number or expression for a file without the key."),
    ] = None


Dimension = Annotated[int, Field(strict=True, gt=0)] | str | FromConfig | None
"""A number, an expression, a key of the model's configuration, or nothing: then the parameters tell, by shapes in the rules."""


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """Return the value of an expression.

    Raises:
        ValueError: it isn't arithmetic on known names, or a result is too large for a dimension.
    """
    return _value(_parsed(expression), expression, values.__getitem__, values)


def is_expression(text: str) -> bool:
    """Return whether a string is meant as an expression: it holds more than a number, which needs no quotes."""
    return not text.strip().isdecimal()


class _NoValueError(ValueError):
    """Names the dimension that has no value, with the reason."""


def dimension_values(dimensions: Mapping[str, Dimension], config: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the number of each name, except names that get their value from parameters.

    Args:
        config: content of the model's configuration file; None if the spec names none.

    Raises:
        ValueError: names the dimension that has no value, with the reason.
    """
    found: dict[str, int] = {}

    def resolve(name: str, users: tuple[str, ...] = ()) -> int:
        if name in found:
            return found[name]
        if name in users:
            raise _NoValueError(f"{name}: {' → '.join((*users[users.index(name) :], name))} goes round in a circle")
        given = dimensions[name]
        if given is None:
            raise _NoValueError(f"{name}: it has no value of its own, so nothing can be computed from it but a shape")
        if isinstance(given, FromConfig):
            given = _configured(name, given, config)
        if isinstance(given, str):
            try:
                given = _value(_parsed(given), given, lambda other: resolve(other, (*users, name)), dimensions)
            except _NoValueError:
                raise  # the error is about another dimension, and names it
            except ValueError as error:
                raise _NoValueError(f"{name}: {error}") from error
        if not 0 < given <= LARGEST:
            raise _NoValueError(f"{name}: a dimension is a positive number, not {given}")
        return found.setdefault(name, given)

    for name in (name for name, given in dimensions.items() if given is not None):
        resolve(name)
    return found


def _configured(name: str, given: FromConfig, config: Mapping[str, Any] | None) -> int | str:
    if config is None:
        raise _NoValueError(f"{name}: the spec names no file with 'config' from which {given.config!r} could be read")
    value: Any = config
    for key in given.config.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None and given.default is not None:
        return given.default
    if type(value) is not int:
        kind = "missing" if value is None else f"a {type(value).__name__}"
        raise _NoValueError(f"{name}: {given.config!r} in the model's configuration is {kind}, no integer")
    return value


def read_config(folder: Path, name: str) -> Mapping[str, Any]:
    """Read a model's configuration, a file in the spec's folder or in one inside it.

    Messages tell nothing of what it holds but numbers: a spec of somebody else's may name any file.

    Raises:
        ValueError: there is no such file, it lies elsewhere, or it holds no JSON object.
    """
    path = folder / name
    try:
        inside, there, raw = path.resolve().is_relative_to(folder.resolve()), path.is_file(), b""
        if inside and there:
            with path.open("rb") as file:
                raw = file.read(tunables.SPEC_NUMBYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"config: {path} can't be read: {error}") from error
    if not inside:
        raise ValueError(f"config: {path} lies outside the folder of the spec; copy it there")
    if not there:
        raise ValueError(f"config: there is no file {path}")
    if len(raw) > tunables.SPEC_NUMBYTES:
        raise ValueError(f"config: {path} has more than {tunables.SPEC_NUMBYTES} bytes, too many for a configuration")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"config: {path} holds no JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"config: {path} holds no JSON object")
    return content


def _parsed(expression: str) -> ast.expr:
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"an expression of {len(expression)} characters; {LONGEST_EXPRESSION} are allowed")
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} isn't an expression") from error


def _value(node: ast.expr, text: str, value_of: Callable[[str], int], known: Mapping[str, Any]) -> int:
    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            return _bounded(number, text)
        case ast.Name(id=name):
            if name not in known:
                raise ValueError(
                    f"{name!r} in {text!r} isn't a dimension; there are {', '.join(sorted(known)) or 'none'}"
                )
            return value_of(name)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            one, other = _value(left, text, value_of, known), _value(right, text, value_of, known)
            if isinstance(sign, ast.FloorDiv) and other == 0:
                raise ValueError(f"{text!r} divides by zero")
            return _bounded(_OPERATORS[type(sign)](one, other), text)
    raise ValueError(f"{ast.unparse(node)!r} in {text!r} isn't an integer, a name, or one of + - * //")


def _bounded(value: int, text: str) -> int:
    if abs(value) > LARGEST:
        raise ValueError(f"{text!r} is above {LARGEST}")
    return value


NUMBERS = frozenset(("parts", "heads", "widths", "shape", "pad_to_multiple"))
"""Fields of a rule in which an expression may stand for a number."""


def with_numbers(
    rule: Mapping[str, Any], values: Mapping[str, int], free_dims: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Replace the expressions in a rule by numbers, except those in ``shape`` over dimensions without a value.

    Returns the rule, and what is wrong with its expressions, by place.
    """
    problems: list[str] = []
    samples = {**values, **dict.fromkeys(free_dims, 1)}

    def number(value: Any, place: str) -> Any:
        if not isinstance(value, str) or not is_expression(value):
            return value
        try:
            names = {node.id for node in ast.walk(_parsed(value)) if isinstance(node, ast.Name)}
            if place.startswith("shape") and not names.isdisjoint(free_dims):
                evaluate(value, samples)
                return value
            return evaluate(value, values)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            return 1

    numbered = dict(rule)
    for key in (key for key in rule if key in NUMBERS):
        if isinstance(rule[key], list):
            numbered[key] = [number(item, f"{key}[{place}]") for place, item in enumerate(rule[key])]
        else:
            numbered[key] = number(rule[key], key)
    return numbered, problems


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
    stated: Mapping[str, StatedShape], found: Mapping[str, Shape], given: Mapping[str, int], free_dims: Collection[str]
) -> ShapeCheck:
    """Compare the shapes that rules state with whole shapes, by parameter. Parameters without a whole shape are left out.

    A dimension without a given value gets the one that most parameters give it; the others are then the wrong ones.
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
    expected_of = {shape: [_extent(item, values) for item in shape] for shape in {each[0] for each in fitting.values()}}
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
