"""Dimensions of a model: numbers with names, and arithmetic on them, so that one spec serves models of every size.

    config: config.json
    dimensions:
      head_dim: 128
      heads: {config: num_attention_heads}
      kv_heads: {config: num_key_value_heads, default: heads}
    rules:
      - {match: "**.qkv_proj.weight", pattern: shard, dim: 0, parts: [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]}

An expression holds integers, names of dimensions, ``+ - * //`` and parentheses, and nothing else.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

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
"""A number, an expression over other dimensions, a key of the model's configuration, or nothing. A dimension without a value gets
it from the parameters whose shapes the rules state, and can be used in such shapes only."""


def evaluate(expression: str, values: Mapping[str, int]) -> int:
    """Return the value of an expression.

    Raises:
        ValueError: it isn't arithmetic on known names, or a result is too large for a dimension.
    """
    return _value(_parsed(expression), expression, values.__getitem__, values)


def names_in(expression: str) -> frozenset[str]:
    """Return the dimensions that an expression uses.

    Raises:
        ValueError: it isn't an expression.
    """
    return frozenset(node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name))


def is_expression(text: str) -> bool:
    """Return whether a string is meant as an expression: it holds more than a number, which needs no quotes."""
    return not text.strip().isdecimal()


def dimension_values(dimensions: Mapping[str, Dimension], config: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the number of each name, except names that get their value from parameters.

    Args:
        config: content of the model's configuration file; None if the spec names none.

    Raises:
        ValueError: names the dimension that has no value, with the reason.
    """
    found: dict[str, int] = {}
    for name in (name for name, given in dimensions.items() if given is not None):
        _resolve(name, dimensions, config, found, ())
    return found


class _NoValueError(ValueError):
    """Names the dimension that has no value, with the reason."""


def _resolve(
    name: str,
    dimensions: Mapping[str, Dimension],
    config: Mapping[str, Any] | None,
    found: dict[str, int],
    open_names: tuple[str, ...],
) -> int:
    if name in found:
        return found[name]
    if name in open_names:
        raise _NoValueError(
            f"{name}: {' → '.join((*open_names[open_names.index(name) :], name))} goes round in a circle"
        )
    given = dimensions[name]
    if given is None:
        raise _NoValueError(f"{name}: it has no value of its own, so nothing can be computed from it but a shape")
    if isinstance(given, FromConfig):
        given = _configured(name, given, config)
    if isinstance(given, str):
        names = (*open_names, name)
        try:
            given = _value(
                _parsed(given), given, lambda other: _resolve(other, dimensions, config, found, names), dimensions
            )
        except _NoValueError:
            raise  # the error is about another dimension, and names it
        except ValueError as error:
            raise _NoValueError(f"{name}: {error}") from error
    if not 0 < given <= LARGEST:
        raise _NoValueError(f"{name}: a dimension is a positive number, not {given}")
    found[name] = given
    return given


def _configured(name: str, given: FromConfig, config: Mapping[str, Any] | None) -> int | str:
    if config is None:
        raise _NoValueError(f"{name}: the spec names no file with 'config' from which {given.config!r} could be read")
    value: Any = config
    for key in given.config.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None and given.default is not None:
        return given.default
    if type(value) is not int:
        raise _NoValueError(f"{name}: {given.config!r} in the model's configuration is {value!r}, no integer")
    return value


def read_config(path: Path) -> Mapping[str, Any]:
    """Read a model's configuration.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} can't be read: {error}") from error
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


NUMBERS = ("parts", "heads", "widths", "shape", "pad_to_multiple")
"""Fields of a rule in which an expression may stand for a number."""


def with_numbers(
    rule: Mapping[str, Any], values: Mapping[str, int], free_dims: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Replace the expressions in a rule by numbers. Returns the rule, and what is wrong with its expressions, by place.

    Args:
        free_dims: dimensions without a value; expressions with these stay in ``shape``.
    """
    problems: list[str] = []
    samples = dict.fromkeys(free_dims, 1)

    def number(value: Any, place: str) -> Any:
        if not isinstance(value, str) or not is_expression(value):
            return value
        try:
            if place.startswith("shape") and names_in(value) & samples.keys():
                _value(_parsed(value), value, lambda name: values.get(name, 1), {**values, **samples})
                return value
            return evaluate(value, values)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            return 1

    def replaced() -> Iterator[tuple[str, Any]]:
        for key, value in rule.items():
            if key in NUMBERS and isinstance(value, list):
                yield key, [number(item, f"{key}[{place}]") for place, item in enumerate(value)]
            else:
                yield key, number(value, key) if key in NUMBERS else value

    return dict(replaced()), problems
