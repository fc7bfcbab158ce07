"""Patterns from shapes, and how a first spec is written."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp_deepspeed.language import Spec
from ucp_deepspeed.language.inference import (
    Guess,
    fused_candidates,
    generalised,
    guess_from_shapes,
    padded_candidates,
    spec_text,
)
from ucp_deepspeed.layout import Partial, Pattern, Replicate, Scale, Shape, Shard, ShardGrid


@pytest.mark.parametrize(
    ("local_shapes", "whole", "pattern"),
    [
        ([(4, 2)] * 2, (4, 2), Replicate()),
        ([(4, 2)] * 2, (8, 2), Shard(0)),
        ([(4, 2)] * 2, (4, 4), Shard(1)),
        ([(4, 2), (3, 2)], (7, 2), Shard(0)),
        ([(6, 2)] * 2, (11, 2), Shard(0, vocabulary=True)),
        ([(6, 2)] * 2, (10, 2), None),
        ([(4, 2)] * 4, (8, 2), Shard(0, heads=(2,))),
        ([(4, 2)] * 8, (8, 2), Shard(0, heads=(2,))),
        ([(2, 2)] * 4, (4, 4), ShardGrid((0, 1), ((2, 2),))),
        ([(2, 1)] * 8, (4, 4), ShardGrid((0, 1), ((2, 4),))),
        ([(4, 2)] * 2, (9, 2), None),
        ([(4, 2)] * 2, (4, 2, 1), None),
        ([(4, 2), (5, 2)], (8, 2), None),
        ([(2, 2)] * 4, (4, 6), None),
        ([(6,)] * 2, (10,), None),
        ([()] * 2, (), Replicate()),
    ],
    ids=str,
)
def test_a_pattern_from_shapes(local_shapes: list[Shape], whole: Shape, pattern: Pattern | None) -> None:
    guess = guess_from_shapes(local_shapes, whole)
    assert guess.pattern == pattern
    # Whatever is more than a plain shard, or less, is said.
    assert bool(guess.comments) == (pattern not in (Replicate(), Shard(0), Shard(1)))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5), st.integers(0, 1))
def test_a_guess_leads_back_to_the_shapes(rows: int, columns: int, degree: int, dim: int) -> None:
    whole = (rows, columns)
    local_shapes = Shard(dim).local_shapes(whole, degree)
    pattern = guess_from_shapes(local_shapes, whole).pattern
    assert pattern is not None and pattern.layout(whole, local_shapes).logical_shape == whole


@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize(
    ("degree", "heads"), [(2, (2, 1)), (4, (4, 2)), (4, (8, 1)), (8, (16, 4)), (8, (32, 2)), (6, (12, 3))]
)
def test_copies_of_kv_heads_are_no_padding(degree: int, heads: tuple[int, int], rest: Shape) -> None:
    q_heads, kv_heads = heads
    fused = Shard(0, parts=(q_heads // kv_heads, 1, 1), heads=(q_heads, kv_heads, kv_heads))
    whole = (4 * (q_heads + 2 * kv_heads), *rest)
    found = padded_candidates(fused.local_shapes(whole, degree), whole)
    assert fused in found
    guess = guess_from_shapes(fused.local_shapes(whole, degree), whole)
    assert guess.pattern is None and f"parts {list(fused.parts)}, heads {list(fused.heads)}" in guess.comments[0]


@given(st.integers(35_000, 300_000), st.sampled_from([2, 4, 8, 16]))
def test_a_vocabulary_is_no_attention(rows: int, degree: int) -> None:
    """Padded to a multiple of 128 rows a rank on one side, and of 128 on the other."""
    one, several = (-(-rows // multiple) * multiple for multiple in (128, 128 * degree))
    guess = guess_from_shapes([(several // degree, 2)] * degree, (one, 2))
    assert guess.pattern == (Shard(0) if one == several else Shard(0, vocabulary=True))


def test_fused_candidates_have_the_same_shapes() -> None:
    found = fused_candidates(Shard(0), [(6, 2), (6, 2)], (12, 2))
    assert [pattern.parts for pattern in found] == [(1, 1), (1, 1, 1), (4, 1, 1)]
    for pattern in found:
        assert pattern.local_shapes((12, 2), 2) == ((6, 2), (6, 2))
    for plain in (Shard(0, vocabulary=True), Shard(0, parts=(1, 1)), Shard(0, heads=(2,))):
        assert fused_candidates(plain, [(6, 2), (6, 2)], (12, 2)) == ()
    assert fused_candidates(Shard(0), [(12, 2)], (12, 2)) == ()


GUESSES = {
    "layers.0.a.weight": Guess(Shard(0)),
    "layers.1.a.weight": Guess(Shard(0)),
    "layers.0.b.weight": Guess(Shard(1)),
    "layers.1.b.weight": Guess(Shard(0, parts=(2, 1, 1), heads=(4, 2, 2)), ("one of a kind",)),
    "*odd: name.weight": Guess(Partial()),
    "scaled.bias": Guess(Replicate(scale=Scale(powers={"fp32": 1, "exp_avg": -1}))),
    "plain.bias": Guess(Replicate(scale=Scale())),
    "grid.weight": Guess(ShardGrid((1, 0), ((2, 2), (2, 4)))),
    "words.weight": Guess(Shard(0, vocabulary=True)),
    "mystery.3.weight": Guess(None, ("nobody knows",)),
}


def test_a_written_spec_says_what_was_known() -> None:
    text = spec_text("mine", 'so: "called"', GUESSES, ["first", "second"])
    assert text.startswith("# first\n# second\nfamily: mine\n")
    spec = Spec.parse(yaml.safe_load(text), "mine.yaml")
    assert spec.description == 'so: "called"'
    known = {name: guess.pattern for name, guess in GUESSES.items() if guess.pattern is not None and "*" not in name}
    assert spec.patterns(known) == known
    assert spec.matches("layers.7.a.weight") and not spec.matches("layers.7.b.weight")
    assert not spec.matches("mystery.3.weight")
    for line in ("  # one of a kind\n", "  # nobody knows\n", "  #     - mystery.*.weight\n", '"*odd: name.weight"'):
        assert line in text


def test_numbers_become_stars() -> None:
    assert generalised("a.0.b1.12.weight") == "a.*.b1.*.weight"
