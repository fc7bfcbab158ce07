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


@pytest.mark.parametrize(
    ("saved", "live", "restored", "told"),
    [
        ((5, 8), (5, 8), (8, 8), None),
        ((None, 8), (5, 8), (8, 8), None),
        ((5, 8), (None, 8), (8, 8), None),
        ((None, 8), (None, 8), (8, 8), None),
        (
            (5, 8),
            (5, 6),
            (6, 6),
            "a, b: 8 rows in the checkpoint and 6 in the model, of which 5 aren't padding; 2 of the check",
        ),
        (
            (5, 6),
            (5, 8),
            (6, 6),
            "a, b: 6 rows in the checkpoint and 8 in the model, of which 5 aren't padding; 2 of the model",
        ),
        ((5, 8), (7, 8), (5, 7), None),
    ],
)
def test_padding_that_both_sides_have_is_restored(
    saved: tuple[int | None, int], live: tuple[int | None, int], restored: tuple[int, int], told: str | None
) -> None:
    pattern = dict.fromkeys("ab", Shard(vocabulary=True))
    checkpoint = Sketch(dict.fromkeys("ab", (saved[1], 3)), vocabulary_size=saved[0], patterns=pattern)
    shapes, topology = dict.fromkeys("ab", (live[1], 3)), Topology(tp=2)
    found = paired(checkpoint, model(shapes, vocabulary_size=live[0], inferred=pattern, topology=topology))
    rows = [(found.view.logical_shape(name)[0], found.layouts[name].logical_shape[0]) for name in "ab"]
    assert rows == [restored] * 2
    assert [line.startswith(told or "") for line in found.rows.told()] == [True] * (told is not None)
    assert not list(found.rows.told({"a", "b"}))


def test_vocabularies_on_later_stages_count_too() -> None:
    half, pattern = (3, 2), {"a": Shard(vocabulary=True)}
    tensor = ModelTensor("a", "trainable", (None, None, half, half))
    described = ModelDescription(
        topology=Topology(tp=2, pp=2), tensors={"a": tensor}, inferred=pattern, vocabulary_size=5
    )
    assert paired(Sketch({"a": (6, 2)}), described).rows.held == {"a": (6, 6)}


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
