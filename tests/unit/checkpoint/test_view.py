"""The universal view of sketched checkpoints: whole shapes and layouts, under logical names, and what contradicts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sketches import Sketch, cut

from ucp_deepspeed.checkpoint import Parameter
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, ParameterGroup
from ucp_deepspeed.checkpoint.view import UniversalView, held_shapes, layouts_of, names_of, parameter_names
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.layout import Layout, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard, Unique
from ucp_deepspeed.plan import Fragment, Target, plan_tensor

SHAPES: dict[str, Shape] = {"rows": (6, 4), "columns": (4, 6), "same": (5,), "still": (3,), "mask": (5,)}
KINDS: Any = {"still": "frozen", "mask": "buffer"}
PATTERNS: dict[str, Pattern] = {"rows": Shard(0), "columns": Shard(1), "same": Replicate(), "still": Replicate()}
RULES: dict[str, dict[str, Any]] = {
    "rows": {"pattern": "shard", "dim": 0},
    "columns": {"pattern": "shard", "dim": 1},
    "same": {"pattern": "replicate"},
    "still": {"pattern": "replicate"},
}


def spec_of(names: dict[str, Any] | None = None, **changed: dict[str, Any]) -> Spec:
    """The rules, by the parameters' own names, with some changed or more."""
    rules = [{"match": name, **rule} for name, rule in (RULES | changed).items()]
    return Spec.parse({"family": "tests", "rules": rules, "names": names or {}}, "tests")


def saved_on(tp: int, **changes: Any) -> Sketch:
    return Sketch(SHAPES, KINDS, **{"topology": Topology(tp), "patterns": PATTERNS, **changes})


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_parameters_are_whole_on_any_degree(tp: int) -> None:
    view = UniversalView.of(saved_on(tp))
    assert {name: view.logical_shape(name) for name in view.parameters} == SHAPES
    assert view.patterns == {**PATTERNS, "mask": Replicate()}
    assert {layout.degree for layout in view.layouts.values()} == {tp}
    assert parameter_names(view.checkpoint) == ["rows", "columns", "same", "still"]


@given(tp=st.integers(1, 4), extent=st.integers(4, 9), dim=st.integers(0, 1))
def test_each_element_lies_where_its_rank_has_it(tp: int, extent: int, dim: int) -> None:
    """Against the elements' numbers, counted off rank by rank."""
    shape = (extent, 3) if dim == 0 else (3, extent)
    view = UniversalView.of(Sketch({"a": shape}, topology=Topology(tp), patterns={"a": Shard(dim)}))
    local_shapes = view.checkpoint.parameters["a"].local_shapes
    expected, start = {}, 0
    for rank, held in enumerate(local_shapes):
        assert held is not None
        for row in range(held[0]):
            for column in range(held[1]):
                place = row * held[1] + column
                whole = (row + start * (dim == 0)) * shape[1] + column + start * (dim == 1)
                expected[whole] = f"a/fp32/{rank}", place
        start += held[dim]
    for whole, (path, place) in expected.items():
        target = Target(Layout.whole(shape), 0, (Fragment(whole, 1, None, 0),))
        [copy] = plan_tensor(view.source("a", "fp32"), target, "fp32")
        assert (copy.sources[0].buffer.path, copy.sources[0].start) == (path, place)
    assert sorted(expected) == list(range(extent * 3))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_layouts_on_another_degree(degree: int) -> None:
    found = UniversalView.of(saved_on(2)).layouts_on(degree)
    assert {name: tuple(local.shape for local in layout.locals) for name, layout in found.items()} == {
        name: cut(shape, PATTERNS.get(name), degree) for name, shape in SHAPES.items()
    }


def test_a_degree_that_a_pattern_does_not_allow() -> None:
    view = UniversalView.of(saved_on(2), spec_of(rows={**RULES["rows"], "widths": [3, 3]}))
    with pytest.raises(MismatchError, match="sketch can't be cut over 3 tensor-parallel ranks") as caught:
        view.layouts_on(3)
    assert caught.value.problems == ("rows: widths (3, 3) don't split 6 over 3 ranks",)


def test_padding_of_a_vocabulary_is_stripped() -> None:
    spec = spec_of(rows={**RULES["rows"], "vocabulary": True})
    sketch = saved_on(2, patterns={**PATTERNS, "rows": Shard(0, vocabulary=True)})
    assert UniversalView.of(sketch, spec).logical_shape("rows") == (6, 4)
    assert UniversalView.of(sketch, spec, vocabulary_size=5).logical_shape("rows") == (5, 4)
    sketch.vocabulary_size = 4
    assert UniversalView.of(sketch).logical_shape("rows") == (4, 4)
    alone = UniversalView.of_single_rank(saved_on(1), {name: name for name in SHAPES}, ["rows", "mask"])
    assert list(alone.parameters) == ["rows", "mask"] and alone.logical_shape("rows") == (6, 4)


def test_patterns_that_contradict_a_record_are_listed() -> None:
    sketch = saved_on(2, recorded_shapes={**SHAPES, "same": (6,)})
    assert UniversalView.of(saved_on(2, recorded_shapes=SHAPES), spec_of()).patterns["rows"] == Shard(0)
    with pytest.raises(MismatchError, match="the layouts contradict") as caught:
        UniversalView.of(sketch, spec_of(still={"pattern": "partial"}))
    assert caught.value.problems == (
        "same: logical shape (5,); recorded was (6,)",
        "still: partial; recorded was replicate",
    )
    names = {name: name for name in SHAPES}
    unchecked = UniversalView(sketch, names, PATTERNS, check_record=False)
    assert unchecked.over(sketch).logical_shape("same") == (5,)


def test_nothing_known_of_a_cut() -> None:
    with pytest.raises(SpecError, match="no layout is known for 4 parameters"):
        UniversalView.of(saved_on(2, patterns={}), degree=1)


def test_names_follow_a_spec_and_further_names_stay_apart() -> None:
    names = {"mine": [{"from": "still", "to": "frozen"}, {"from": "head", "to": "output"}]}
    sketch = saved_on(1, tied={"head": "rows", "other": "nowhere"}, logical_names={"same": "recorded"})
    view = UniversalView.of(sketch, spec_of(names, frozen=RULES["still"], output=RULES["rows"], recorded=RULES["same"]))
    assert view.logical_of["still"] == "frozen" and view.tied == {"output": "rows"}
    assert view.groups == (ParameterGroup(("rows", "columns", "recorded"), {"lr": 0.1}),)
    assert names_of(sketch, [])["same"] == "recorded"
    renamed = view.under({"rows": "table", "head": "words"})
    assert (renamed.logical_of["rows"], renamed.logical_of["still"]) == ("table", "frozen")
    assert renamed.patterns["table"] == Shard(0) and renamed.tied == {"words": "table"}
    assert view.under({"rows": "rows"}) is view


def test_names_that_differ_by_wrappers() -> None:
    plain = UniversalView.of(Sketch({"a": (4,), "l.b": (2,)}))
    wrapped = UniversalView.of(Sketch({"module.a": (4,), "module.l.b": (2,)}))
    assert list(wrapped.under_names_of(plain).parameters) == ["a", "l.b"]
    assert plain.under_names_of(plain) is plain


def test_copies_are_cut_like_what_they_are_tied_to() -> None:
    tied = saved_on(2, copies={"columns": "rows"})
    with pytest.raises(MismatchError, match="tied parameters can't be cut in different ways") as caught:
        UniversalView.of(tied)
    assert caught.value.problems[0].startswith("columns: shard on dimension 1; in the checkpoint it is tied to rows")


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (((3, 4), (3, 4)), None),
        (((3, 4), (3, 4), None, None), None),
        ((None, None, (3, 4), (3, 4)), None),
        (((3, 4), None), "a: 1 of 2 tensor-parallel ranks hold it"),
        (((3, 4), (3, 5)), "a: local shapes [(3, 4), (3, 5)] differ outside dimension 0"),
    ],
)
def test_layouts_of_stages(shapes: HeldShapes, problem: str | None) -> None:
    if problem is None:
        layout = layouts_of({"a": Shard(0)}, {"a": shapes}, 2, None, "the target")["a"]
        assert layout.logical_shape == (6, 4) and layout.degree == len(shapes)
        return
    with pytest.raises(MismatchError, match="shapes of the target contradict the patterns") as caught:
        layouts_of({"a": Shard(0)}, {"a": shapes}, 2, None, "the target")
    assert caught.value.problems == (problem,)


def test_one_stages_copy_is_read() -> None:
    """The first that holds it, or the one that was chosen."""
    copy = Parameter("a", "trainable", (None, (4,), (4,)), {"fp32": "F32"}, {})
    for stage, place in ((None, 1), (1, 1), (2, 2)):
        sketch = Sketch({}, parameters={"a": replace(copy, stage=stage)}, topology=Topology(1, 3))
        view = UniversalView(sketch, {"a": "a"}, {"a": Unique()})
        assert [bool(local.pieces) for local in view.layouts["a"].locals] == [place == rank for rank in range(3)]
        assert held_shapes(sketch, {"a": LogicalName("a")}) == {"a": ((4,),)}
