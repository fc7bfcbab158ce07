"""Names that wrappers of modules give, and names that a library has changed."""

from __future__ import annotations

import pytest

from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.language.naming import Renaming, translate
from ucp_deepspeed.language.renames import as_lines, suggest_renamings
from ucp_deepspeed.language.schemes import best_scheme, plain_name, plain_names, seen_through


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.a.weight", "a.weight"),
        ("layers.0._orig_mod.mlp.weight", "layers.0.mlp.weight"),
        ("module._orig_mod.module.a", "a"),
        ("layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.w", "layers.0.w"),
        ("base_model.model.q_proj.base_layer.weight", "q_proj.weight"),
        ("base_model.model.q_proj.lora_A.default.weight", "q_proj.lora_A.default.weight"),
        ("base_layer.0.weight", "base_layer.0.weight"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("a.module.w", "a.module.w"),
        ("module", "module"),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_never_two_equal_names() -> None:
    assert plain_names(["module.a", "a", "module.b"]) == {"module.a": "module.a", "a": "a", "module.b": "b"}
    assert seen_through(["module.a"], ["a"]) == {"module.a": "a"}
    assert seen_through(["a"], ["_orig_mod.a", "b"]) == {"a": "_orig_mod.a"}
    assert seen_through(["_orig_mod.a"], ["module.a", "a"]) == {}
    assert seen_through(["_orig_mod.a", "module.a"], ["a"]) == {}
    assert seen_through(["a", "_orig_mod.a"], ["a", "module.a"]) == {}


def test_specs_apply_to_what_is_wrapped() -> None:
    raw = {"family": "f", "rules": [{"match": "a.*.w", "pattern": "replicate"}, {"match": "b", "pattern": "unique"}]}
    spec = Spec.parse(raw, "here")
    assert best_scheme(["_orig_mod.a.0.w", "_orig_mod.b"], spec)[1] == {"_orig_mod.a.0.w": "a.0.w", "_orig_mod.b": "b"}
    assert best_scheme(["a.0.w", "module.c"], spec)[1] == {"a.0.w": "a.0.w", "module.c": "module.c"}
    everything = Spec.parse({"family": "f", "rules": [{"match": "**", "pattern": "replicate"}]}, "here")
    assert best_scheme(["module.a"], everything)[1] == {"module.a": "module.a"}
    plain = ["0.self_attention.q.weight", "decoder.layers.0.self_attention.linear_qkv.weight"]
    assert load_spec("megatron_core_gpt").coverage(plain) < 1


RENAMED = {
    "one module": (["visual.0.w", "visual.1.w", "head.w"], ["model.visual.0.w", "model.visual.1.w", "head.w"], 1),
    "the whole model": (["layers.0.w", "head.w", "scale"], ["model.layers.0.w", "model.head.w", "model.scale"], 1),
    "the other way": (["model.layers.0.w", "model.head.w"], ["layers.0.w", "head.w"], 1),
    "numbers between": (
        ["blocks.0.attn.w", "blocks.1.attn.w", "blocks.0.mlp.w"],
        ["layers.0.attention.w", "layers.1.attention.w", "layers.0.mlp.w"],
        2,
    ),
    "a beginning twice": (["model.a.w", "model.b.w"], ["model.model.a.w", "model.model.b.w"], 1),
}


@pytest.mark.parametrize("case", RENAMED)
def test_what_is_suggested_makes_the_names_the_same(case: str) -> None:
    source, target, count = RENAMED[case]
    common = set(source) & set(target)
    sides = [{name: (2, len(name[-3:])) for name in side if name not in common} for side in (source, target)]
    found = suggest_renamings(*sides, common)
    assert len(found) == count
    assert set(translate(source, tuple(found)).values()) == set(translate(target, tuple(found)).values())
    assert all(f'from: "{each.from_}"' in as_lines(found) for each in found)


def test_nothing_is_suggested_without_a_rule() -> None:
    assert suggest_renamings({"a.w": (2,)}, {"b.w": (3,)}, []) == []
    assert suggest_renamings({"a.w": (2,)}, {"b.v": (2,)}, []) == []
    assert suggest_renamings({"layers.0.w": (2,)}, {"layers.1.w": (2,)}, []) == []
    # It would also rename what is the same already.
    assert suggest_renamings({"a.w": (2,)}, {"b.w": (2,)}, ["a.v", "b.v"]) == []
    many = {f"x{number}.w": (number,) for number in range(20)}
    assert suggest_renamings(many, {f"y{number}.w": (number,) for number in range(20)}, []) == []
    assert isinstance(suggest_renamings({"a": (1,)}, {"b.a": (1,)}, [])[0], Renaming)
