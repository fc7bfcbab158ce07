"""Naming schemes: the grammar of renamings, and which logical name a parameter gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import Spec, load_spec, logical_names, naming_specs
from ucp_deepspeed.language.naming import Renaming, translate


def renaming(from_: str, to: str) -> Renaming:
    return Renaming.model_validate({"from": from_, "to": to})


def spec_of(family: str, matches: list[str], names: Mapping[str, list[tuple[str, str]]]) -> Spec:
    schemes = {scheme: [{"from": one, "to": other} for one, other in renamings] for scheme, renamings in names.items()}
    rules = [{"match": match, "pattern": "replicate"} for match in matches]
    return Spec.parse({"family": family, "rules": rules, "names": schemes}, f"{family}.yaml")


@pytest.mark.parametrize(
    ("from_", "to", "name", "expected"),
    [
        ("{n}.mlp.**", "layers.{n}.mlp.**", "4.mlp.up.weight", "layers.4.mlp.up.weight"),
        ("{n}.mlp.**", "layers.{n - 2}.mlp.**", "4.mlp.up.weight", "layers.2.mlp.up.weight"),
        ("{n}.mlp.**", "layers.{ n+10 }.**", "4.mlp.up.weight", "layers.14.up.weight"),
        ("{n}.mlp.**", "layers.{n-2}.**", "2.mlp.w", "layers.0.w"),
        ("{n}.mlp.**", "layers.{n - 2}.**", "1.mlp.w", None),
        ("{n}.a", "b", "7.a", "b"),
        ("{n}.a", "{n}.{n + 1}", "7.a", "7.8"),
        ("{n}.a", "x.{n}", "007.a", "x.7"),
        ("{ n }.a", "x.{n}", "7.a", "x.7"),
        ("{outer}.{inner}.a", "{inner - 1}.{outer + 1}", "3.5.a", "4.4"),
        ("a.**", "**.b.**", "a.x.y", "x.y.b.x.y"),
        ("**.a", "b.**", "x.y.a", "b.x.y"),
        ("a.**.b", "c", "a.x.y.b", "c"),
        ("a.**", "b.**", "a.", None),
        ("a.**", "b.**", "a", None),
        ("a", "b", "a", "b"),
        ("a", "b", "aa", None),
        ("a.b", "c", "axb", None),
        ("{n}.a", "b", "-1.a", None),
        ("{n}.a", "b", "x.a", None),
        ("{n}.a", "b", "layers.1.a", None),
        ("{n}.a", "b", "1.a.c", None),
    ],
)
def test_a_renaming_applies_to_names_of_its_form(from_: str, to: str, name: str, expected: str | None) -> None:
    assert renaming(from_, to).logical_name(name) == expected


@pytest.mark.parametrize(
    ("from_", "to", "message"),
    [
        ("{n - 2}.a", "b", "{n - 2} in '{n - 2}.a' isn't a number's name in braces"),
        ("{}.a", "b", "{} in '{}.a' isn't a number's name in braces"),
        ("{N}.a", "b", "{N} in '{N}.a' isn't a number's name in braces"),
        ("{n}.{n}.a", "b", "{n} stands twice in '{n}.{n}.a'"),
        ("{n}.{ n }.a", "b", "{ n } stands twice in '{n}.{ n }.a'"),
        ("**.a.**", "b", "** stands twice in '**.a.**'"),
        ("{n}.a", "{n * 2}.a", "{n * 2} in '{n * 2}.a' isn't a number, nor one plus or minus another"),
        ("{n}.a", "{n - m}.a", "{n - m} in '{n - m}.a' isn't a number, nor one plus or minus another"),
        ("{n}.a", "{n - 1 - 1}.a", "{n - 1 - 1} in '{n - 1 - 1}.a' isn't a number, nor one plus"),
        ("{n}.a", "{2}.a", "{2} in '{2}.a' isn't a number, nor one plus or minus another"),
        ("{n}.a", "{m}.a", "{m} in '{m}.a' doesn't stand in '{n}.a'"),
        ("a", "b.{n - 1}", "{n - 1} in 'b.{n - 1}' doesn't stand in 'a'"),
        ("{n}.a", "**", "** in '**' doesn't stand in '{n}.a'"),
    ],
)
def test_wrong_renamings_are_refused_with_their_place(from_: str, to: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of("mine", ["**"], {"pipeline": [("{n}.fine", "fine.{n}"), (from_, to)]})
    assert str(caught.value).startswith("spec mine.yaml is not valid (1):\n  names.pipeline[1]: ")
    assert message in str(caught.value)


def test_recorded_names_may_not_collide_either() -> None:
    with pytest.raises(SpecError, match=r"a and b have the same logical name, a"):
        logical_names(["a", "b"], [], {"b": "a"})


@pytest.mark.parametrize(("from_", "to"), [("{n}.*", "x.{n}"), ("{n.a", "x"), ("a}", "x"), ("{n}.a", "{n}.*")])
def test_signs_that_stand_for_nothing(from_: str, to: str) -> None:
    with pytest.raises(SpecError, match="stands for nothing"):
        spec_of("mine", ["**"], {"pipeline": [(from_, to)]})


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ({"from": "a"}, "names.pipeline[0].to: is missing"),
        ({"to": "a"}, "names.pipeline[0].from: is missing"),
        ({"from": "a", "to": "b", "too": "c"}, "names.pipeline[0].too: unknown key"),
        ({"from": 3, "to": "b"}, "names.pipeline[0].from: "),
    ],
)
def test_wrong_keys_are_refused_with_their_place(raw: Any, place: str) -> None:
    rules = [{"match": "**", "pattern": "unique"}]
    with pytest.raises(SpecError) as caught:
        Spec.parse({"family": "mine", "rules": rules, "names": {"pipeline": [raw]}}, "mine.yaml")
    assert f"  {place}" in str(caught.value)


def test_a_name_to_which_nothing_applies_keeps_its_own() -> None:
    scheme = (renaming("{n}.a", "layers.{n - 2}.a"),)
    assert translate(["1.a", "2.a", "3.a", "b"], scheme) == {
        "1.a": "1.a",
        "2.a": "layers.0.a",
        "3.a": "layers.1.a",
        "b": "b",
    }
    assert translate(["a", "b"], ()) == {"a": "a", "b": "b"}
    assert translate([], scheme) == {}


def test_a_name_with_two_logical_names_is_refused() -> None:
    scheme = (renaming("{n}.**", "second.**"), renaming("{n}.a.**", "first.{n}.**"))
    with pytest.raises(SpecError, match=r"^0\.a\.b has 2 logical names: first\.0\.b, second\.a\.b$"):
        translate(["0.a.b"], scheme)
    assert translate(["0.b"], scheme) == {"0.b": "second.b"}


def test_two_renamings_that_agree_are_one() -> None:
    scheme = (renaming("{n}.a", "x.{n - 1}.a"), renaming("1.**", "x.0.**"))
    assert translate(["1.a", "2.a"], scheme) == {"1.a": "x.0.a", "2.a": "x.1.a"}


def test_two_names_that_become_one_are_refused() -> None:
    scheme = (renaming("{n}.a", "a"),)
    with pytest.raises(SpecError, match=r"^0\.a and 1\.a have the same logical name, a$"):
        translate(["0.a", "1.a"], scheme)
    with pytest.raises(SpecError, match=r"^a and 0\.a have the same logical name, a$"):
        translate(["a", "0.a"], scheme)


TWO_CLASSES = {
    "pipeline": [("{n}.a", "layers.{n - 1}.a"), ("0.words", "words")],
    "wrapped": [("module.**", "**")],
}


@pytest.mark.parametrize(
    "names",
    [
        ["words", "layers.0.a", "layers.1.a"],
        ["0.words", "1.a", "2.a"],
        ["module.words", "module.layers.0.a", "module.layers.1.a"],
    ],
    ids=["plain", "pipeline", "wrapped"],
)
def test_the_scheme_under_which_most_names_match_is_taken(names: list[str]) -> None:
    spec = spec_of("mine", ["words", "layers.*.a"], TWO_CLASSES)
    expected = ["words", "layers.0.a", "layers.1.a"]
    assert list(logical_names(names, [spec]).values()) == expected
    # A buffer, of which no rule speaks, goes along.
    assert logical_names([*names, "elsewhere"], [spec])["elsewhere"] == "elsewhere"


def test_names_that_fit_nothing_are_their_own() -> None:
    spec = spec_of("mine", ["words", "layers.*.a"], TWO_CLASSES)
    assert logical_names(["x", "1.b"], [spec]) == {"x": "x", "1.b": "1.b"}
    assert logical_names(["x", "1.a"], []) == {"x": "x", "1.a": "1.a"}
    assert logical_names([], [spec]) == {}


def test_recorded_names_win() -> None:
    spec = spec_of("mine", ["words", "layers.*.a"], TWO_CLASSES)
    recorded = {"1.a": "recorded", "not.here": "nowhere"}
    expected = {"0.words": "words", "1.a": "recorded", "2.a": "layers.1.a"}
    assert logical_names(["0.words", "1.a", "2.a"], [spec], recorded) == expected
    assert logical_names(["0.words", "1.a"], [], recorded) == {"0.words": "0.words", "1.a": "recorded"}


def test_families_that_name_otherwise_are_refused() -> None:
    """Both fit; the layers of one begin at 1, those of the other at 2."""
    one, two = (
        spec_of(f"from_{first}", ["layers.*.a", "words"], {"p": [("{n}.a", f"layers.{{n - {first}}}.a")]})
        for first in (1, 2)
    )
    assert logical_names(["words"], [one, two]) == {"words": "words"}
    with pytest.raises(SpecError) as caught:
        logical_names(["words", "3.a", "4.a"], [one, two])
    for part in ("'from_1'", "'from_2'", "name 3.a otherwise", "--spec"):
        assert part in str(caught.value)
    assert caught.value.problems == ("3.a", "4.a")
    assert logical_names(["3.a"], [two]) == {"3.a": "layers.1.a"}


def gpt_names(layers: int, pipeline: bool) -> list[str]:
    """Some parameters of a tied Megatron-Core GPT model, of which one name is found in no other family."""
    first = ["embedding.word_embeddings.weight", "embedding.position_embeddings.weight"]
    if pipeline:
        first = ["tied_modules.embedding.word_embeddings.weight", "1.position_embeddings.weight"]
    blocks = [str(layer + 2) if pipeline else f"decoder.layers.{layer}" for layer in range(layers)]
    local_names = ("self_attention.linear_qkv.bias", "mlp.linear_fc1.weight", "input_layernorm.bias")
    last = f"{layers + 2}.final_layernorm.weight" if pipeline else "decoder.final_layernorm.weight"
    return first + [f"{block}.{local_name}" for block in blocks for local_name in local_names] + [last]


def llama_names(layers: int, pipeline: bool) -> list[str]:
    """Some parameters of an untied Megatron-Core Llama, of which one name is found in no other family."""
    first = "0.word_embeddings.weight" if pipeline else "embedding.word_embeddings.weight"
    blocks = [str(layer + 2) if pipeline else f"decoder.layers.{layer}" for layer in range(layers)]
    local_names = ("self_attention.q_layernorm.weight", "mlp.linear_fc2.weight")
    norm = f"{layers + 2}.final_layernorm.weight" if pipeline else "decoder.final_layernorm.weight"
    output = f"{layers + 3}.output_layer.weight" if pipeline else "output_layer.weight"
    return [first, *[f"{block}.{local_name}" for block in blocks for local_name in local_names], norm, output]


FAMILIES = {"megatron_core_gpt": gpt_names, "megatron_core_llama": llama_names}


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 130))
def test_pipelines_of_the_families_get_the_names_of_the_plain_model(family: str, layers: int) -> None:
    names = FAMILIES[family]
    found = logical_names(names(layers, True), [load_spec(family)])
    assert list(found.values()) == names(layers, False)
    plain = names(layers, False)
    assert logical_names(plain, [load_spec(family)]) == dict(zip(plain, plain, strict=True))


@settings(deadline=None, max_examples=300)
@given(
    numbers=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    offsets=st.lists(st.integers(-150, 150), min_size=3, max_size=3),
    space=st.sampled_from(["", " "]),
    rest=st.from_regex(r"[a-z_]{1,4}(\.[a-z0-9_]{1,3}){0,2}", fullmatch=True),
    order=st.permutations(range(3)),
    data=st.data(),
)
def test_arithmetic_is_that_of_a_format_string(
    numbers: list[int], offsets: list[int], space: str, rest: str, order: list[int], data: st.DataObject
) -> None:
    """Numbers in any order, with any distance, and the rest of the name."""
    places = [place for place in order if place < len(numbers)]
    words = data.draw(st.lists(st.sampled_from(["a", "b.c", "layers"]), min_size=3, max_size=3))
    sums = [f"{{n{place}{space}{'-' if offsets[place] < 0 else '+'}{space}{abs(offsets[place])}}}" for place in places]
    from_ = ".".join(f"{{n{place}}}.{words[place]}" for place in range(len(numbers)))
    to = ".".join(f"x{place}.{total}" for place, total in zip(places, sums, strict=True))
    name = ".".join(f"{number}.{word}" for number, word in zip(numbers, words, strict=False))
    totals = {place: numbers[place] + offsets[place] for place in places}
    expected = ".".join(f"x{place}.{totals[place]}" for place in places)
    found = renaming(f"{from_}.**", f"{to}.**").logical_name(f"{name}.{rest}")
    assert found == (f"{expected}.{rest}" if min(totals.values()) >= 0 else None)
    assert translate([f"{name}.{rest}"], (renaming(from_, to),)) == {f"{name}.{rest}": f"{name}.{rest}"}


def test_the_named_spec_names_alone() -> None:
    mine = spec_of("mine", ["x"], {})
    assert naming_specs(mine, gpt_names(2, True)) == [mine]
    assert naming_specs(mine) == [mine]


@pytest.mark.parametrize("pipeline", [False, True])
def test_the_first_side_that_a_family_fits_decides(pipeline: bool) -> None:
    def families(*sides: list[str]) -> list[str]:
        return [spec.family for spec in naming_specs(None, *sides)]

    qkv = "2.self_attention.linear_qkv.weight" if pipeline else "decoder.layers.0.self_attention.linear_qkv.weight"
    gpt, llama, foreign = gpt_names(2, pipeline), [*llama_names(2, pipeline), qkv], ["mystery.weight"]
    assert families(gpt) == families(gpt, llama) == families(foreign, gpt) == ["megatron_core_gpt"]
    assert families(llama) == families(llama, gpt) == families([], llama) == ["megatron_core_llama"]
    assert families(foreign) == families([*gpt, "mystery.weight"]) == families([*gpt, *llama[2:4]]) == families() == []


def test_all_families_that_fit_the_side_are_taken() -> None:
    names = ["0.word_embeddings.weight", "2.mlp.linear_fc1.weight"]
    found = naming_specs(None, names)
    assert [spec.family for spec in found] == ["megatron_core_deepseek", "megatron_core_gpt", "megatron_core_llama"]
    assert list(logical_names(names, found).values()) == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
    ]


def test_a_scheme_is_taken_also_where_every_name_matches_anyway() -> None:
    """The natural rule without tensor parallelism: with it, names match as they are, too."""
    spec = Spec.parse(
        {
            "family": "own",
            "rules": [{"match": "**", "pattern": "replicate"}],
            "names": {"pipeline": [{"from": "{n}.**", "to": "blocks.{n - 1}.**"}]},
        },
        "test",
    )
    assert logical_names(["1.w", "2.w"], [spec]) == {"1.w": "blocks.0.w", "2.w": "blocks.1.w"}
    assert logical_names(["blocks.0.w"], [spec]) == {"blocks.0.w": "blocks.0.w"}
