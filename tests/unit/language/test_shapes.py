"""Whole shapes that rules state: dimensions without a value, and which parameters contradict them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Shape


def spec_of(dimensions: Mapping[str, Any], **shapes: list[Any]) -> Spec:
    rules = [{"match": f"{name}.*", "pattern": "replicate", "shape": shape} for name, shape in shapes.items()]
    return Spec.parse({"family": "mine", "dimensions": dimensions, "rules": rules}, "mine.yaml")


MLP = {"up": ["ffn", "hidden"], "gate_up": ["2 * ffn", "hidden"], "down": ["hidden", "ffn"], "norm": ["hidden"]}
FREE = {"ffn": None, "hidden": None}
RIGHT: dict[str, Shape] = {"up.0": (12, 4), "gate_up.0": (24, 4), "down.0": (4, 12), "norm.0": (4,), "norm.1": (4,)}


def test_dimensions_without_a_value_get_theirs_from_the_parameters() -> None:
    check = spec_of(FREE, **MLP).check_shapes(RIGHT)
    assert (check.values, check.problems, check.confirmed) == ({"ffn": 12, "hidden": 4}, {}, frozenset(RIGHT))


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("gate_up.0", (12, 4), "the rule states [2 * ffn, hidden], which is [24, 4]"),
        ("down.0", (12, 4), "the rule states [hidden, ffn], which is [4, 12]"),
        ("norm.1", (5,), "the rule states [hidden], which is [4]"),
        ("norm.1", (4, 1), "has 2 dimensions, and the rule states [hidden]"),
    ],
)
def test_those_that_differ_from_most_are_wrong(name: str, shape: Shape, reason: str) -> None:
    shapes = {**RIGHT, "up.1": (12, 4), name: shape}
    assert spec_of(FREE, **MLP).check_shapes(shapes).problems == {name: reason}


def test_a_dimension_that_only_one_parameter_has_confirms_nothing() -> None:
    spec = spec_of(FREE, up=["ffn", "hidden"], other=["2 * ffn"], silent=[None, None])
    check = spec.check_shapes({"up.0": (12, 4), "silent.0": (1, 2)})
    assert (check.values, check.confirmed) == ({"ffn": 12, "hidden": 4}, frozenset())
    # An expression that can't be solved says nothing.
    assert spec.check_shapes({"other.0": (7,)}).confirmed == frozenset()
    assert spec.check_shapes({"up.0": (12, 4), "other.0": (24,)}).confirmed == {"other.0"}


def test_given_dimensions_bind() -> None:
    spec = spec_of({"hidden": 4, "ffn": "3 * hidden"}, **MLP)
    assert spec.check_shapes(RIGHT).problems == {}
    wrong = {name: tuple(2 * extent for extent in shape) for name, shape in RIGHT.items()}
    assert set(spec.check_shapes(wrong).problems) == set(RIGHT)


def test_ambiguous_and_silent_parameters_are_left_out() -> None:
    rules = [{"match": "a.*", "pattern": "replicate", "shape": [1]}, {"match": "*.b", "pattern": "replicate"}]
    spec = Spec.parse({"family": "mine", "rules": rules}, "mine.yaml")
    assert spec.check_shapes({"a.b": (2,), "c.b": (2,), "d": (2,)}).problems == {}
