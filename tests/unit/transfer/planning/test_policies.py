"""Matching, and what each policy allows: every difference is an obstacle unless a policy names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sketches import STATES, Sketch, model, paired

from ucp_deepspeed.checkpoint import Parameter
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.transfer.planning.policies import (
    UNRECORDED_HINT,
    Matching,
    Obstacle,
    Obstacles,
    Policies,
    check_any,
    check_matching,
    check_recorded,
    match,
    some_names,
)
from ucp_deepspeed.transfer.planning.target import ModelTensor

SHAPE = (4, 3)
TRAINED = Parameter("a", "trainable", (SHAPE,), STATES, {"step": 3.0})
UNSTEPPED = replace(TRAINED, states={"fp32": "F32"}, scalars={})
FROZEN = Parameter("a", "frozen", (SHAPE,), {"weight": "F32"}, {})
BUFFER = replace(FROZEN, kind="buffer")
LIVE = ModelTensor("a", "trainable", (SHAPE,))
IDLE = replace(LIVE, idle=True)
STILL = replace(LIVE, kind="frozen")
COUNTER = replace(LIVE, kind="buffer")
ALL = Policies(initialise=True, drop=True, strict=False)


@pytest.mark.parametrize(
    ("saved", "live", "reason", "allowing"),
    [
        (TRAINED, LIVE, None, {}),
        (None, LIVE, "missing in the checkpoint; the model expects (4, 3)", {"initialise": True}),
        (TRAINED, None, "extra in the checkpoint (trainable, local shape (4, 3))", {"drop": True}),
        (None, STILL, "missing in the checkpoint; the model expects (4, 3)", {"strict": False}),
        (FROZEN, None, "extra in the checkpoint (frozen, local shape (4, 3))", {"strict": False}),
        (None, COUNTER, "missing in the checkpoint; the model expects (4, 3)", {"strict": False}),
        (FROZEN, LIVE, "frozen in the checkpoint, trainable in the model; ", {"initialise": True}),
        (FROZEN, LIVE, "frozen in the checkpoint, trainable in the model; ", {"optimizer_states": "keep"}),
        (FROZEN, IDLE, None, {}),
        (TRAINED, STILL, "trainable in the checkpoint, frozen in the model; ", {"drop": True}),
        (TRAINED, STILL, "trainable in the checkpoint, frozen in the model; ", {"optimizer_states": "reset"}),
        (UNSTEPPED, STILL, None, {}),
        (FROZEN, COUNTER, "frozen in the checkpoint, buffer in the model", None),
        (replace(FROZEN, may_be_buffer=True), COUNTER, None, {}),
        (BUFFER, LIVE, "buffer in the checkpoint, trainable in the model", None),
    ],
)
def test_each_difference_and_the_policy_that_allows_it(
    saved: Parameter | None, live: ModelTensor | None, reason: str | None, allowing: dict[str, Any] | None
) -> None:
    """``allowing``: None where no policy does."""

    def told(policies: Policies) -> list[str]:
        obstacles = Obstacles()
        check_matching({"a": saved} if saved else {}, {"a": live} if live else {}, policies, obstacles)
        assert obstacles.names <= {"a"}
        return [obstacle.reason for obstacle in obstacles]

    assert [found[: len(reason or found)] for found in told(Policies())] == ([reason] if reason else [])
    if allowing is None:
        assert told(ALL) == told(Policies())
    else:
        assert told(replace(Policies(), **allowing)) == []


def test_both_sides_names_are_matched_in_their_own_orders() -> None:
    source = {"old": TRAINED, "b": FROZEN, "a": TRAINED, "c": UNSTEPPED, "d": TRAINED}
    target = {"d": STILL, "new": LIVE, "a": LIVE, "b": LIVE, "c": STILL}
    assert match(source, target) == Matching(
        restored=("d", "a", "b", "c"), initialised=("new",), dropped=("old",), unfrozen=("b",), frozen=("d",)
    )


def test_remedies_stand_once_beside_the_obstacles() -> None:
    obstacles = Obstacles()
    check_matching({"x": TRAINED, "y": FROZEN}, {"z": ModelTensor("z", "trainable", ((7,),))}, Policies(), obstacles)
    [remedy] = obstacles.remedies
    assert obstacles.names == {"x", "y", "z"}
    assert all(way in remedy for way in ("under other names", '"on_missing": "init"', '"on_extra": "drop"'))
    renamed = Obstacles()
    check_matching({"model.a": TRAINED}, {"module.a": LIVE}, Policies(), renamed)
    assert "a spec with these lines" in renamed.remedies[0] and "on_missing" not in renamed.remedies[0]


def test_what_is_refused_already_has_no_second_reason() -> None:
    obstacles = Obstacles()
    obstacles.add("a", "for another reason")
    check_matching({"a": TRAINED}, {}, Policies(), obstacles)
    assert list(obstacles) == [Obstacle("a", "for another reason")] and not obstacles.remedies


@pytest.mark.parametrize("policies", [Policies(strict=False), Policies(initialise=True), Policies()])
def test_values_that_are_in_no_file(policies: Policies) -> None:
    obstacles = Obstacles()
    check_recorded({"a": "DeepSpeed left it out"}, policies, obstacles)
    refused = policies == Policies()
    assert list(obstacles) == [Obstacle("a", "DeepSpeed left it out")] * refused
    assert obstacles.remedies == [UNRECORDED_HINT] * refused


@pytest.mark.parametrize(
    ("target", "policies", "reason"),
    [
        ({"z": LIVE}, ALL, "here holds no parameter of the model: it has a, b, and the model z; "),
        ({"a": LIVE, "z": LIVE}, ALL, None),
        (
            {"b": STILL, "z": LIVE},
            ALL,
            "here holds none of the parameters that the model trains (z), and so nothing to go",
        ),
        ({"b": STILL, "z": LIVE}, replace(ALL, optimizer_states="keep"), None),
        ({"b": STILL}, ALL, None),
        ({"count": COUNTER}, ALL, None),
        ({"count": COUNTER, "z": STILL}, ALL, "here holds no parameter of the model: it has a, b, and the model z; "),
    ],
)
def test_a_load_that_would_only_seem_to_be_one(
    target: dict[str, ModelTensor], policies: Policies, reason: str | None
) -> None:
    source, obstacles = {"a": TRAINED, "b": FROZEN, "count": BUFFER}, Obstacles()
    check_any(source, target, match(source, target), policies, obstacles, "here")
    assert [found.reason[: len(reason or "")] for found in obstacles] == ([reason] if reason else [])
    assert obstacles.names <= {None}


def test_names_beyond_three_are_counted() -> None:
    assert [some_names(list("abcde")[:number]) for number in (0, 1, 3, 5)] == [
        "no parameters",
        "a",
        "a, b, c",
        "a, b, c and 2 more",
    ]


def test_an_obstacle_of_the_whole_model_stands_alone() -> None:
    found = paired(Sketch({"a": SHAPE}), model({"z": (9,)}), Policies(initialise=True, drop=True))
    with pytest.raises(
        MismatchError, match="sketch holds no parameter of the model: it has a, and the model z"
    ) as caught:
        found.obstacles.check("sketch")
    assert caught.value.problems == ()


def test_what_an_error_lists_becomes_obstacles() -> None:
    obstacles = Obstacles()
    obstacles.add_error(MismatchError("groups differ", ["a", "b: by 2"], "a way"))
    obstacles.add_error(SpecError("no rule", ["c"]))
    assert list(obstacles) == [
        Obstacle("a", "groups differ"),
        Obstacle("b", "by 2"),
        Obstacle(None, "no rule (1):\n  c"),
    ]
    assert obstacles.remedies == ["a way"]
