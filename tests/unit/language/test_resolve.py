"""The source of patterns that wins, and contradictions between sources."""

from __future__ import annotations

import pytest

from ucp_deepspeed.errors import MismatchError, SpecError, UnsupportedError
from ucp_deepspeed.language import Spec, load_spec, per_rank, resolve_patterns
from ucp_deepspeed.language.resolve import contradicts, contradicts_record, describe
from ucp_deepspeed.layout import Partial, Pattern, PerRank, Replicate, Scale, Shard, ShardGrid, Unique

SPEC = Spec.parse({"family": "mine", "rules": [{"match": "**", "pattern": "shard", "dim": 1}]}, "mine.yaml")
FAMILY_NAMES = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]


def test_spec_wins_over_all() -> None:
    found = resolve_patterns(
        ["a"], degree=2, spec=SPEC, recorded={"a": Partial()}, inferred={"a": Shard(1, parts=(1,))}
    )
    assert found == {"a": Shard(1)}


def test_recorded_wins_over_inferred() -> None:
    parts = Shard(0, parts=(1, 1))
    names = ["a", "b"]
    found = resolve_patterns(names, degree=2, recorded={"a": parts}, inferred={"a": Shard(0), "b": Replicate()})
    assert found == {"a": parts, "b": Replicate()}


def test_recorded_wins_over_the_family() -> None:
    recorded: dict[str, Pattern] = dict.fromkeys(FAMILY_NAMES, Partial())
    assert resolve_patterns(FAMILY_NAMES, degree=2, recorded=recorded) == recorded


def test_inferred_wins_over_the_family() -> None:
    inferred: dict[str, Pattern] = dict.fromkeys(FAMILY_NAMES, Shard(1))
    assert resolve_patterns(FAMILY_NAMES, degree=2, inferred=inferred) == inferred


def test_a_family_yields_where_a_live_parameter_tells_its_whole_cut() -> None:
    embedding, norm = FAMILY_NAMES
    live: dict[str, Pattern] = {embedding: Replicate()}
    assert resolve_patterns(FAMILY_NAMES, degree=2, inferred=live, exact=True) == {
        embedding: Replicate(),
        norm: Replicate(),
    }
    with pytest.raises(MismatchError, match="the live parameter is replicate"):
        resolve_patterns(FAMILY_NAMES, degree=2, inferred=live)


def test_family_where_nothing_is_known() -> None:
    expected = load_spec("megatron_core_llama").patterns(FAMILY_NAMES)
    assert resolve_patterns(FAMILY_NAMES, degree=2) == expected
    assert isinstance(expected[FAMILY_NAMES[0]], Shard) and expected[FAMILY_NAMES[1]] == Replicate()


def test_unique_without_model_parallelism() -> None:
    """An unknown pattern doesn't matter on one rank. A known one is kept for later readers."""
    assert resolve_patterns(["a", "b"], degree=1, recorded={"a": Shard(1)}) == {"a": Shard(1), "b": Unique()}


def test_unknown_names_say_how_to_name_a_spec() -> None:
    with pytest.raises(SpecError) as caught:
        resolve_patterns(["a", "b", "c", "d"], degree=2, recorded={"d": Shard()})
    for part in ("no layout is known for 3 parameters", '"spec": "path.yaml"', "--spec", "\n  a\n  b\n  c"):
        assert part in str(caught.value)
    assert caught.value.problems == ("a", "b", "c")


def test_on_the_same_degree_nothing_needs_to_be_known() -> None:
    """A family that fits still tells more; a guess where DeepSpeed's own record says that it can't tell doesn't."""
    found = resolve_patterns(["a", "b"], degree=2, recorded={"b": Shard()}, same_degree=True)
    assert found == {"a": PerRank(), "b": Shard()}
    assert per_rank(found) == ["a"]
    assert resolve_patterns(FAMILY_NAMES, degree=2, same_degree=True) == resolve_patterns(FAMILY_NAMES, degree=2)
    layer = "decoder.layers.0.mlp.linear_"
    disputed = [f"{layer}fc1.weight", f"{layer}fc2.weight"]
    assert per_rank(resolve_patterns(disputed, degree=2, same_degree=True)) == disputed
    refused = {FAMILY_NAMES[0]: "cut at random"}
    assert per_rank(resolve_patterns(FAMILY_NAMES, degree=2, refused=refused, same_degree=True)) == FAMILY_NAMES
    with pytest.raises(UnsupportedError, match="cut at random"):
        resolve_patterns(FAMILY_NAMES, degree=2, refused=refused)
    with pytest.raises(SpecError, match="matches no rule"):
        resolve_patterns(["mystery"], degree=2, spec=load_spec("megatron_core_gpt"), same_degree=True)


def test_shares_of_different_shapes_need_a_layout_on_the_same_degree_too() -> None:
    shapes = {"a": [(3, 2), (2, 2)], "b": [(2,), (2,)]}
    with pytest.raises(SpecError, match="no layout is known for 2 parameters"):
        resolve_patterns(["a", "b"], degree=2, local_shapes=shapes, same_degree=True)
    with pytest.raises(UnsupportedError, match="cut at random"):
        resolve_patterns(["a", "b"], degree=2, local_shapes=shapes, refused={"b": "cut at random"}, same_degree=True)
    assert per_rank(resolve_patterns(["b"], degree=2, local_shapes=shapes, same_degree=True)) == ["b"]


def test_contradictions_are_all_listed() -> None:
    inferred: dict[str, Pattern] = {"a": Shard(0), "b": Replicate(), "c": Shard(1)}
    with pytest.raises(MismatchError) as caught:
        resolve_patterns(["a", "b", "c"], degree=2, spec=SPEC, inferred=inferred)
    assert caught.value.problems == (
        "a: spec 'mine' says shard on dimension 1, the live parameter is shard on dimension 0",
        "b: spec 'mine' says shard on dimension 1, the live parameter is replicate",
    )


def test_contradictions_of_the_checkpoint_name_it() -> None:
    with pytest.raises(MismatchError, match="a: the checkpoint says partial, the live parameter is shard"):
        resolve_patterns(["a"], degree=4, recorded={"a": Partial()}, inferred={"a": Shard()})


def test_on_one_rank_only_a_spec_may_not_contradict() -> None:
    """Nothing is cut there, but what a spec says is recorded, and serves when the checkpoint is cut later."""
    assert resolve_patterns(["a"], degree=1, recorded={"a": Shard(1)}, inferred={"a": Replicate()}) == {"a": Shard(1)}
    with pytest.raises(
        MismatchError, match="a: spec 'mine' says shard on dimension 1, the live parameter is replicate"
    ):
        resolve_patterns(["a"], degree=1, spec=SPEC, inferred={"a": Replicate()})


def test_shapes_that_the_spec_denies() -> None:
    """Joined along dimension 1 it would be (2, 8). A recorded pattern needs no such evidence."""
    rules = [{"match": "**", "pattern": "shard", "dim": 1, "shape": [4, 4]}]
    spec = Spec.parse({"family": "mine", "rules": rules}, "mine.yaml")
    local_shapes = {"a": [(2, 4), (2, 4)], "b": [(4, 2), (4, 2)], "elsewhere": [(1,)]}
    with pytest.raises(MismatchError) as caught:
        resolve_patterns(["a", "b"], degree=2, spec=spec, local_shapes=local_shapes)
    assert caught.value.problems == ("a: shard on dimension 1; logical shape [2, 8]; the rule states [4, 4]",)
    found = resolve_patterns(["a", "b"], degree=2, spec=spec, recorded={"a": Shard(1)}, local_shapes=local_shapes)
    assert found == {"a": Shard(1), "b": Shard(1)}


def test_shapes_choose_between_families() -> None:
    """Two families have these names. The rows of the first layer tell that the model has no gate."""
    layer = "decoder.layers.0.mlp.linear_"
    names = [f"{layer}fc1.weight", f"{layer}fc2.weight"]
    with pytest.raises(SpecError, match="both fit and disagree"):
        resolve_patterns(names, degree=2)
    for rows, parts in ((6, (1,)), (12, (1, 1))):
        shapes = {names[0]: [(rows, 4)] * 2, names[1]: [(4, 6)] * 2}
        assert resolve_patterns(names, degree=2, local_shapes=shapes)[names[0]] == Shard(0, parts=parts)
    with pytest.raises(
        SpecError, match=r"no family fits \(nearest is megatron_core_\w+: all names match, \d shapes don't"
    ):
        resolve_patterns(names, degree=2, local_shapes={names[0]: [(9, 4)] * 2, names[1]: [(4, 6)] * 2})


def test_spec_that_does_not_fit() -> None:
    with pytest.raises(SpecError, match="mystery: matches no rule"):
        resolve_patterns(["mystery"], degree=1, spec=load_spec("megatron_core_gpt"))


@pytest.mark.parametrize(
    ("pattern", "live", "expected"),
    [
        (Shard(0), Shard(0), False),
        (Replicate(), Replicate(), False),
        (Shard(0, parts=(1, 1)), Shard(0), False),
        (Shard(0, vocabulary=True), Shard(0), False),
        (Shard(0, widths=(3, 2)), Shard(0), False),
        (Shard(0, parts=(1, 1), pad_to_multiple=2), Shard(0, parts=(1, 1)), False),
        (Partial(), Replicate(), False),
        (Replicate(scale=Scale()), Replicate(), False),
        (Unique(), Replicate(), False),
        (Shard(0), Shard(1), True),
        (Shard(0), Shard(0, parts=(1, 1)), True),
        (Shard(0, parts=(2, 1, 1)), Shard(0, parts=(1, 1)), True),
        (Shard(0), Replicate(), True),
        (Replicate(), Shard(0), True),
        (Shard(0, heads=(2,)), Shard(0), False),
        (ShardGrid((0, 1), ()), Shard(0), True),
        (ShardGrid((0, 1), ()), Replicate(), True),
        (Replicate(), ShardGrid((0, 1), ()), True),
    ],
    ids=str,
)
def test_contradicts(pattern: Pattern, live: Pattern, expected: bool) -> None:
    assert contradicts(pattern, live) is expected


@pytest.mark.parametrize(
    ("pattern", "recorded", "expected"),
    [
        (Shard(0, vocabulary=True, pad_to_multiple=8), Shard(0), False),
        (Shard(0), Shard(0, vocabulary=True), True),
        (Shard(0, vocabulary=True), Shard(0, widths=(3, 2)), True),
        (Shard(0, heads=(4,)), Shard(0), False),
        (Shard(0), Shard(0, heads=(4,)), True),
        (Shard(0, parts=(1, 1), heads=(4, 4)), Shard(0, parts=(1, 1)), True),
        (Shard(0, heads=(4,)), Shard(1), True),
        (ShardGrid((0, 1), ()), Shard(0), True),
        (Shard(0, parts=(1, 1)), Shard(0, parts=(1, 1)), False),
        (Shard(0, parts=(1, 1)), Shard(0), True),
        (Shard(0), Shard(0, parts=(1, 1)), True),
        (Shard(0, vocabulary=True), Shard(0, parts=(1, 1)), True),
        (Shard(1), Shard(0), True),
        (Shard(0, widths=(3, 2)), Shard(0), True),
        (Partial(), Replicate(), True),
        (Replicate(scale=Scale()), Replicate(), True),
        (Replicate(), Shard(0), True),
    ],
    ids=str,
)
def test_what_was_recorded_binds(pattern: Pattern, recorded: Pattern, expected: bool) -> None:
    assert contradicts_record(pattern, recorded) is expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (Unique(), "unique"),
        (Replicate(), "replicate"),
        (Partial(), "partial"),
        (Replicate(scale=Scale()), "replicate (scaled, powers fp32 1, weight 1)"),
        (Shard(1), "shard on dimension 1"),
        (Shard(0, parts=(1, 1)), "shard on dimension 0 in parts 1:1"),
        (Shard(0, widths=(3, 2)), "shard on dimension 0 in widths 3, 2"),
        (Shard(0, vocabulary=True), "shard on dimension 0 (vocabulary)"),
        (Shard(0, parts=(4, 1, 1), heads=(8, 2, 2)), "shard on dimension 0 in parts 4:1:1 with heads 8:2:2"),
        (ShardGrid((0, 1), ((2, 2), (4, 2))), "shard on dimensions 0, 1 in grids 2×2, 4×2"),
    ],
)
def test_describe(pattern: Pattern, words: str) -> None:
    assert describe(pattern) == words
