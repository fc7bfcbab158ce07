"""Matching by forms finds what trying every glob on every name finds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import Spec, globs
from ucp_deepspeed.language.globs import Matcher, form_of
from ucp_deepspeed.language.naming import Renaming, translate

PARTS = ["a", "fc1", "fc12", "1b", "0", "1", "12", "007", "²", "٣", ""]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join) | st.text("a12.", max_size=7)
GLOBS = st.lists(st.sampled_from([*PARTS, "*", "**", "fc*", "*1", "1*", "*a"]), min_size=1, max_size=4).map(".".join)
RULES = st.lists(st.lists(GLOBS | st.text("a12.*", max_size=6), min_size=1, max_size=3), min_size=1, max_size=5)


def fits(glob: str, name: str) -> bool:
    """One character after another, without regular expressions."""
    if not glob:
        return not name
    if glob.startswith("**"):
        return any(fits(glob[2:], name[taken:]) for taken in range(len(name) + 1))
    if glob.startswith("*"):
        part = name.split(".", 1)[0]
        return any(fits(glob[1:], name[taken:]) for taken in range(len(part) + 1))
    return name[:1] == glob[0] and fits(glob[1:], name[1:])


def plain_fits(rules: Sequence[Sequence[str]], name: str) -> tuple[tuple[int, int], ...]:
    first = [next((place for place, glob in enumerate(globs) if fits(glob, name)), None) for globs in rules]
    return tuple((number, place) for number, place in enumerate(first) if place is not None)


@given(RULES, st.lists(NAMES, min_size=1, max_size=6))
@example([["*.fc1"], ["a.1"], ["*.1", "*.*"]], ["a.fc1", "a.1", "a.2", "a.fc2"])
@example([["*1.a"], ["1*.a"]], ["11.a", "12.a", "2.a"])
@example([["**.*", "*.0"]], ["a.0", "a.1"])
@settings(max_examples=400, deadline=None)
def test_as_every_glob_on_every_name(rules: list[list[str]], names: list[str]) -> None:
    matcher = Matcher(rules)
    expected = [plain_fits(rules, name) for name in names]
    assert [matcher.fits(name) for name in names] == expected
    assert matcher.count_unique(names) == sum(len(found) == 1 for found in expected)
    used = {
        (n, p) for n, globs in enumerate(rules) for p, glob in enumerate(globs) if any(fits(glob, x) for x in names)
    }
    assert set(matcher.unused(names)) == {(n, p) for n, globs in enumerate(rules) for p in range(len(globs))} - used


@given(RULES, st.lists(NAMES, min_size=1, max_size=6, unique=True))
@settings(max_examples=100, deadline=None)
def test_errors_of_a_spec(rules: list[list[str]], names: list[str]) -> None:
    """A name of which no glob, or several, fit is reported by itself, also where another name of its form is sound."""
    spec = Spec.parse({"family": "f", "rules": [{"match": globs, "pattern": "unique"} for globs in rules]}, "f.yaml")
    wrong = [name for name in names if len(plain_fits(rules, name)) != 1]
    assert list(spec.unmatched(names)) == wrong
    try:
        assert list(spec.patterns(names)) == names and not wrong
    except SpecError as error:
        assert [problem.split(":")[0] for problem in error.problems] == wrong


@given(
    st.lists(st.sampled_from(["{n}", "{m}", "**", ".", "a", "1", "fc1"]), min_size=1, max_size=5).map("".join),
    st.lists(NAMES, min_size=1, max_size=4, unique=True),
)
@example("{n}{m}.a", ["12.a", "1.a"])
@example("a.{n}**", ["a.12", "a.1"])
@example("a.1.{n}", ["a.1.5", "a.2.5"])
@settings(max_examples=400, deadline=None)
def test_renamings_apply_as_they_do_to_each_name(pattern: str, names: list[str]) -> None:
    try:
        renaming = Renaming.model_validate({"from": pattern, "to": "found"})
    except ValidationError:
        return
    expected = {name: renaming.logical_name(name) or name for name in names}
    for name in names:
        assert translate([name], (renaming,)) == {name: expected[name]}
    if len(set(expected.values())) == len(names):
        assert translate(names, (renaming,)) == expected
    else:
        with pytest.raises(SpecError, match="have the same logical name"):
            translate(names, (renaming,))


def test_each_form_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Counting:
        def __init__(self, glob: str) -> None:
            self.fullmatch = tried.append

    monkeypatch.setattr(globs, "compiled", Counting)
    matcher = Matcher([["layers.*.up"], ["layers.*.down", "layers.*.gate"]])
    names = [f"layers.{layer}.{part}" for layer in range(1000) for part in ("up", "down", "gate")]
    for name in names:
        matcher.fits(name)
    matcher.count_unique(names)
    assert len(tried) == 3 * 3


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("layers.31.mlp.weight", "layers.0.mlp.weight"),
        ("7.a.8.9", "0.a.0.0"),
        ("linear_fc1.weight", "linear_fc1.weight"),
        ("1b.a2", "1b.a2"),
        ("12", "0"),
        ("a.١٢.b", "a.١٢.b"),
    ],
)
def test_forms(name: str, form: str) -> None:
    assert form_of(name) == form
