"""Pairing a checkpoint with a model: names, ties, patterns and what no file holds."""

from __future__ import annotations

import pytest
from sketches import Sketch, model, paired, reasons

from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.layout.pattern import Shard
from ucp_deepspeed.transfer.planning.policies import Obstacle, Policies
from ucp_deepspeed.transfer.planning.target import ModelDescription, ModelTensor

FOUR = (4, 3)


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
