"""Pairing a checkpoint with a model, without ranks: names, ties, policies, groups and the scheduler, and one error for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.checkpoint import Kind, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import FlatGroup, Shape, Topology
from ucp_deepspeed.layout.pattern import Shard
from ucp_deepspeed.plan import Fragment
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair, pair
from ucp_deepspeed.transfer.planning.policies import Obstacle, Obstacles, Policies
from ucp_deepspeed.transfer.planning.rank_planner import RankPlanner, SlotStates, TargetOptimizer
from ucp_deepspeed.transfer.planning.target import KeptStates, ModelDescription, ModelTensor, TargetRank, TargetSlot

STATES = {"fp32": "F32", "exp_avg": "F32"}
FOUR, GROWN = (4, 3), (6, 3)


class Sketch(Checkpoint):
    """A checkpoint of one rank whose files are imaginary."""

    def __init__(self, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind] | None = None, **changes: Any) -> None:
        self.path, self.form, self.topology = Path("sketch"), "sketch", Topology(zero_stage=1)
        self.versions, self.vocabulary_size = FileVersions(), None
        self.parameters = {
            name: Parameter(
                name,
                kind := (kinds or {}).get(name, "trainable"),
                (shape,),
                STATES if kind == "trainable" else {"weight": "F32"},
                {"step": 3.0} if kind == "trainable" else {},
            )
            for name, shape in shapes.items()
        }
        trained = tuple(name for name, parameter in self.parameters.items() if parameter.kind == "trainable")
        self.groups = (ParameterGroup(trained, {"lr": 0.1}),)
        self.patterns, self.recorded_shapes, self.logical_names = {}, {}, {}
        scheduler = changes.pop("scheduler", None)
        self.run = RunState("fp32", 3, 3, 0, scheduler, None, "0")
        for name, value in changes.items():
            setattr(self, name, value)

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        yield Fragment(local_start, local_stop - local_start, FileExtent("file", 0, "F32", 1000), local_start)

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        return ({},)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        raise AssertionError("not needed for a plan")


def model(shapes: Mapping[str, Shape], kinds: Mapping[str, Kind] | None = None, **more: Any) -> ModelDescription:
    tensors = {
        name: ModelTensor(name, (kinds or {}).get(name, "trainable"), (shape,)) for name, shape in shapes.items()
    }
    return ModelDescription(**{"topology": Topology(zero_stage=1), "tensors": tensors, **more})


def paired(checkpoint: Checkpoint, described: ModelDescription, policies: Policies | None = None, *ties: str) -> Pair:
    """Pair; ``ties`` is what comparing them finds."""
    return pair(checkpoint, described, policies or Policies(), Obstacles(), lambda *_: ties)


def reasons(found: Pair) -> dict[str | None, str]:
    return {obstacle.name: obstacle.reason for obstacle in found.obstacles}


KEPT = TargetOptimizer(lambda slot: KeptStates(*(frozenset(names) for names in (["sum"], ["step"], ["sum"], ["sum"]))))


def test_one_error_lists_all_that_does_not_fit() -> None:
    """A load used to be refused for names first, then for groups, then for the scheduler, then for shapes, then for states."""
    shapes = {"a": FOUR, "b": FOUR, "old": (2,), "c": (5,)}
    groups = tuple(
        ParameterGroup((name,), {"lr": lr}) for name, lr in (("a", 0.1), ("b", 0.2), ("c", 0.1), ("old", 0.1))
    )
    checkpoint = Sketch(shapes, {"c": "frozen"}, groups=groups, scheduler={"base_lrs": [0.1, 0.2, 0.1, 0.1]})
    found = paired(checkpoint, model({"a": FOUR, "b": GROWN, "c": (5,), "new": (7,)}))
    slot = TargetSlot(("a", "b", "c", "new"), FlatGroup((12, 18, 5, 7), 1, alignment=1), 0, 0)
    numbers = PartitionNumbers(found.checkpoint, found.names.source, Topology(), (0, 0), [slot], found.policies)
    found.settings([list(slot.names)], lambda index: {}, numbers)
    found.schedule([list(slot.names)], {})
    with pytest.raises(MismatchError) as caught:
        RankPlanner(found, KEPT, set(), 1).plan(TargetRank(0, 0, (slot,), ()), numbers)
    told = {line.partition(": ")[0]: line.partition(": ")[2] for line in caught.value.problems}
    assert told.keys() == {"c", "new", "old", "parameter group 0", "the scheduler's base_lrs", "b", "a"}
    assert told["new"].startswith("missing in the checkpoint") and told["old"].startswith("extra in the checkpoint")
    assert told["c"].startswith("frozen in the checkpoint, trainable in the model")
    assert told["parameter group 0"].startswith("'lr' is 0.1 for a and 0.2 for b; ")
    assert told["the scheduler's base_lrs"].startswith("parameter group 0 joins groups with [0.1, 0.2, 0.1]; load_lr")
    assert told["b"].startswith("expected logical shape (6, 3), found (4, 3)")
    assert told["a"].startswith("the optimizer keeps ['step', 'sum'], the checkpoint holds ['exp_avg', 'step']")
    assert caught.value.heading == "sketch doesn't fit the model" and '"on_extra": "drop"' in caught.value.remedy


def test_groups_that_become_one_are_told_by_their_first_parameters() -> None:
    groups = (ParameterGroup(("b",), {"lr": 0.2}), ParameterGroup(("a", "c"), {"lr": 0.1}))
    shapes = {"a": FOUR, "b": FOUR, "c": FOUR}
    found = paired(Sketch(shapes, groups=groups), model(shapes))
    numbers = PartitionNumbers(found.checkpoint, found.names.source, Topology(), (0, 0), [], found.policies)
    settings = found.settings([["a", "b", "c"], []], lambda index: {}, numbers)
    assert settings.values == ({"lr": 0.1}, {})
    assert reasons(found)["parameter group 0"].startswith("'lr' is 0.1 for a and 0.2 for b; ")


def test_what_policies_allow_is_no_obstacle() -> None:
    checkpoint = Sketch({"a": FOUR, "old": (2,)})
    found = paired(checkpoint, model({"a": GROWN, "new": (7,)}), Policies(initialise=True, drop=True))
    planner = RankPlanner(found, TargetOptimizer(), set(), 1)
    assert not found.obstacles and planner.grown == ("a",)
    assert planner.outcome([SlotStates((), {}, ("x", "a"), ("y",))]) == (("new", "a", "x"), ("old", "y"))


def test_an_obstacle_of_the_whole_model_stands_alone() -> None:
    found = paired(Sketch({"a": FOUR}), model({"z": (9,)}), Policies(initialise=True, drop=True))
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


def test_shapes_that_no_pattern_explains_are_listed_with_the_rest() -> None:
    spec = Spec.parse({"family": "tests", "rules": [{"match": "*", "pattern": "shard", "dim": 3}]}, "tests")
    with pytest.raises(MismatchError) as caught:
        paired(Sketch({"a": FOUR, "b": (2,)}), model({"a": FOUR}, spec=spec))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["b", "a"]


def test_what_no_file_holds_is_told_once() -> None:
    checkpoint = Sketch({"a": FOUR}, unrecorded={"b": "DeepSpeed left its value out", "elsewhere": "the same"})
    described = model({"a": FOUR, "b": (2,)}, {"b": "frozen"})
    assert reasons(paired(checkpoint, described)) == {"b": "DeepSpeed left its value out"}
    assert not paired(checkpoint, described, Policies(strict=False)).obstacles


def test_names_differ_by_wrappers_and_by_what_a_spec_says() -> None:
    found = paired(Sketch({"a": FOUR, "l.0.b": (2,)}), model({"_orig_mod.a": FOUR, "_orig_mod.l.0.b": (2,)}))
    assert not found.obstacles and found.matching.restored == ("_orig_mod.a", "_orig_mod.l.0.b")
    rules = [{"match": "**", "pattern": "replicate"}]
    names = {"pipeline": [{"from": "{n}.b", "to": "l.{n - 1}.b"}]}
    spec = Spec.parse({"family": "tests", "rules": rules, "names": names}, "tests")
    found = paired(Sketch({"a": FOUR, "l.0.b": (2,)}), model({"a": FOUR, "1.b": (2,)}, spec=spec))
    assert not found.obstacles and found.names.target == {"a": "a", "1.b": "l.0.b"}
    recorded = Sketch({"a": FOUR, "5.b": (2,)}, logical_names={"5.b": "l.3.b"})
    assert paired(recorded, model({"a": FOUR, "5.b": (2,)})).matching.restored == ("a", "l.3.b")


def test_ties_become_the_models() -> None:
    tied = Sketch({"words": FOUR, "norm": (3,)}, tied={"head": "words"})
    apart = paired(tied, model({"words": FOUR, "norm": (3,), "head": FOUR}))
    assert not apart.obstacles and apart.checkpoint.copies == {"head": "words"}
    assert [group.names for group in apart.checkpoint.groups] == [("words", "head", "norm")]
    renamed = paired(tied, model({"head": FOUR, "norm": (3,)}, tied={"words": "head"}))
    assert not renamed.obstacles and renamed.names.source["words"] == "head"
    separate, joining = Sketch({"words": FOUR, "head": FOUR}), model({"words": FOUR}, tied={"head": "words"})
    joined = paired(separate, joining)
    assert (
        not joined.obstacles and joined.joined == {"head": "words"} and list(joined.checkpoint.parameters) == ["words"]
    )
    assert list(paired(separate, joining, None, "head: differs").obstacles) == [Obstacle("head", "differs")]


def test_patterns_come_from_either_side() -> None:
    described = model({"a": FOUR}, inferred={"a": Shard(0)}, topology=Topology(tp=2))
    two = {"a": ModelTensor("a", "trainable", ((2, 3), (2, 3)))}
    cut = ModelDescription(topology=described.topology, tensors=two, inferred=described.inferred)
    found = paired(Sketch({"a": FOUR}), cut)
    assert found.patterns == {"a": Shard(0)} and found.layouts["a"].logical_shape == FOUR
    with pytest.raises(SpecError, match="no layout is known for 1 parameters"):
        paired(Sketch({"a": FOUR}), ModelDescription(topology=cut.topology, tensors=two))
    with pytest.raises(MismatchError, match="doesn't fit the model") as caught:  # names come first
        paired(Sketch({"a": FOUR, "b": (2,)}), ModelDescription(topology=cut.topology, tensors=two))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["b"]


def test_a_scheduler_follows_the_groups() -> None:
    groups = (ParameterGroup(("a",), {}), ParameterGroup(("b",), {}))
    state = {"base_lrs": [0.1, 0.2], "_last_lr": [0.01, 0.02], "milestones": [7, 9], "mine": [1, 2], "last_epoch": 3}
    found = paired(Sketch({"a": FOUR, "b": (2,)}, groups=groups, scheduler=state), model({"a": FOUR, "b": (2,)}))
    assert found.schedule([["a"], ["b"]], {}) == state and not found.obstacles
    moved = found.schedule([["b"], [], ["a"]], {"base_lrs": [9.0, 8.0, 7.0], "mine": [1, 2]})
    assert moved == {**state, "base_lrs": [0.2, 8.0, 0.1], "_last_lr": [0.02, 0.01, 0.01]} and not found.obstacles
    keeping = replace(found, policies=Policies(keep_settings=True))
    kept = keeping.schedule([["a"], ["b"]], {"base_lrs": [1.0, 1.0]})
    assert kept is not None and kept["base_lrs"] == [1.0, 1.0] and kept["_last_lr"] == pytest.approx([0.1, 0.1])
    found.schedule([["b"], ["a"]], {})
    assert "may be of the groups" in reasons(found)["the scheduler's mine"]
