"""Naming schemes read backwards: from logical names to those of a class of model, by the renamings that lead there."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import load_spec, names_in_scheme, spec_names
from ucp_deepspeed.language.naming import Renaming, translate, translate_back


def scheme_of(*renamings: tuple[str, str]) -> tuple[Renaming, ...]:
    return tuple(Renaming.model_validate({"from": one, "to": other}) for one, other in renamings)


SCHEMES = [(family, title) for family in spec_names() for title in load_spec(family).names]


@st.composite
def models(draw: st.DrawFn) -> tuple[str, str, dict[str, str], set[str]]:
    """A family, a scheme, and names of such a model → logical names that match one rule; and those with a number that is lost.

    The names are made by filling globs of the family's rules and the sides of renamings, without the code that translates.
    """
    family, title = draw(st.sampled_from(SCHEMES))
    spec, numbers = load_spec(family), st.integers(0, 40)
    globs = draw(st.lists(st.sampled_from([glob for rule in spec.rules for glob in rule.match]), min_size=1))
    names: dict[str, str] = {}
    lost = set()
    for glob in globs:
        logical = re.sub(r"\*+", lambda _: str(draw(numbers)), glob)
        for renaming in draw(st.permutations(spec.names[title])):
            number = re.search(r"\{n(?: - (\d+))?\}", renaming.to)
            start = renaming.to.replace(number[0], r"(\d+)") if number else renaming.to
            found = re.fullmatch(start.replace(".", r"\.").replace("**", "(.+)"), logical)
            if found is None or len(spec.matches(logical)) != 1 or logical in names.values():
                continue
            n = int(found[1]) + int(number[1] or 0) if number else draw(numbers)
            name = renaming.from_.replace("{n}", str(n)).replace(
                "**", found[found.re.groups] if found.re.groups else ""
            )
            if name in names:
                continue
            names[name] = logical
            if number is None and "{n}" in renaming.from_:
                lost.add(logical)
    return family, title, names, lost


@settings(deadline=None, max_examples=300)
@given(models())
def test_there_and_back_for_all_families(model: tuple[str, str, dict[str, str], set[str]]) -> None:
    family, title, names, lost = model
    spec = load_spec(family)
    assert translate(list(names), spec.names[title]) == names
    back = {logical: name for name, logical in names.items()}
    assert names_in_scheme(list(back), spec, title, among=list(names)) == back
    for logical, name in back.items():
        try:
            found = names_in_scheme([logical], spec, title)
        except SpecError as error:
            (told,) = error.problems
            forms = told.removeprefix(f"{logical}: ").split(" or ")
            assert any(re.fullmatch(form.replace(".", r"\.").replace("{n}", r"\d+"), name) for form in forms), (
                told,
                name,
            )
            assert len(forms) > 1 or logical in lost
        else:
            assert logical not in lost and found == {logical: name}


def test_the_layers_of_every_family_come_back_without_help() -> None:
    assert {"megatron_core_gpt", "megatron_deepspeed_bloom"} <= {family for family, _ in SCHEMES}
    for family, title in SCHEMES:
        spec, first = load_spec(family), 3 if "reordering" in title else 2
        layers = "decoder.layers" if "core" in family else "language_model.encoder.layers"
        found = names_in_scheme([f"{layers}.0.mlp.w", f"{layers}.7.mlp.w", "elsewhere"], spec, title)
        assert list(found.values()) == [f"{first}.mlp.w", f"{first + 7}.mlp.w", "elsewhere"]


@pytest.mark.parametrize(
    ("renamings", "logical", "expected"),
    [
        ([("{n}.a", "x.{n + 10}")], "x.12", "2.a"),
        ([("{n}.a", "{n}.{n + 1}")], "7.8", "7.a"),
        ([("{n}.a", "{n}.{n + 1}")], "7.9", "7.9"),
        ([("{o}.{i}.a", "{i - 1}.{o + 1}")], "4.4", "3.5.a"),
        ([("a.**", "**.b.**")], "x.y.b.x.y", "a.x.y"),
        ([("a.**", "**.b.**")], "x.y.b.x.z", "x.y.b.x.z"),
        ([("module.**", "**")], "x.y", "module.x.y"),
        ([("{n}.a", "x.{n}"), ("1.**", "x.1")], "x.2", "2.a"),
    ],
)
def test_one_name(renamings: list[tuple[str, str]], logical: str, expected: str) -> None:
    assert translate_back([logical], scheme_of(*renamings)) == {logical: expected}


@pytest.mark.parametrize(
    ("renamings", "names", "message"),
    [
        ([("{n}.a", "x.{n}.a"), ("t.**", "x.**")], ["x.0.a"], "x.0.a: 0.a or t.0.a"),
        ([("{n}.a.**", "a.**")], ["a.w", "b"], "a.w: {n}.a.w"),
        ([("a.**", "b")], ["b"], "b: a.**"),
        ([("{n}.a", "x.{n + 10}")], ["x.3", "-"], None),
        ([("a", "b")], ["b", "a"], "b and a have the same name under the naming scheme, a"),
        ([("a", "b")], ["a"], "a: a becomes b"),
        ([("{n}.a", "x.{n}"), ("**.a", "y.**")], ["x.1"], "1.a has 2 logical names: x.1, y.1"),
    ],
)
def test_what_the_renamings_leave_open_or_deny(
    renamings: list[tuple[str, str]], names: list[str], message: str | None
) -> None:
    if message is None:  # no number is negative: such a name isn't of the form, and stays
        assert translate_back(names, scheme_of(*renamings)) == {name: name for name in names}
        return
    with pytest.raises(SpecError) as caught:
        translate_back(names, scheme_of(*renamings))
    assert message in str(caught.value)


def test_names_of_a_model_tell_what_is_open() -> None:
    spec = load_spec("megatron_core_gpt")
    logical = ["embedding.word_embeddings.weight", "decoder.layers.1.mlp.w", "decoder.final_layernorm.weight"]
    among = ["tied_modules.embedding.word_embeddings.weight", "2.mlp.w", "9.final_layernorm.weight"]
    found = names_in_scheme(logical, spec, "pipeline", among)
    assert list(found.values()) == [among[0], "3.mlp.w", among[2]]
    with pytest.raises(SpecError) as caught:
        names_in_scheme(logical, spec, "pipeline")
    assert caught.value.problems == (
        f"{logical[0]}: {among[0]} or {{n}}.word_embeddings.weight",
        f"{logical[2]}: {{n}}.final_layernorm.weight",
    )
    with pytest.raises(SpecError, match="no naming scheme 'wrapped'; its schemes: pipeline"):
        names_in_scheme(logical, spec, "wrapped")
