"""Dimensions: which arithmetic is accepted, what it gives, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import Spec, load_spec
from ucp_deepspeed.language.dimensions import LARGEST, evaluate
from ucp_deepspeed.layout import Shard

VALUES = {"heads": 8, "kv_heads": 2, "head_dim": 16}

expressions = st.recursive(
    st.one_of(st.integers(0, 99).map(str), st.sampled_from(sorted(VALUES))),
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "//"]), inner).map(
        lambda parts: f"({' '.join(parts)})"
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(expressions)
def test_arithmetic_is_pythons(expression: str) -> None:
    try:
        expected = eval(expression, {"__builtins__": {}}, dict(VALUES))
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="divides by zero"):
            evaluate(expression, VALUES)
        return
    assert evaluate(expression, VALUES) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("heads ** 2", "'heads ** 2' in 'heads ** 2' isn't an integer, a name, or one of"),
        ("heads / 2", "isn't an integer, a name"),
        ("-heads", "isn't an integer, a name"),
        ("1.5 * heads", "'1.5' in '1.5 * heads' isn't"),
        ("True + heads", "'True' in"),
        ("__import__('os').system('true')", "isn't an integer, a name"),
        ("heads.bit_length", "isn't an integer, a name"),
        ("[heads][0]", "isn't an integer, a name"),
        ("heads if heads else 1", "isn't an integer, a name"),
        ("(lambda: 1)()", "isn't an integer, a name"),
        ("heads; heads", "isn't an expression"),
        ("heads *", "isn't an expression"),
        ("", "isn't an expression"),
        ("heads\x00", "isn't an expression"),
        ("(" * 190 + "heads", "isn't an expression"),
        ("heads + " * 40 + "heads", "an expression of 325 characters"),
        ("head", "'head' in 'head' isn't a dimension; there are head_dim, heads, kv_heads"),
        (f"heads * {LARGEST}", f"is above {LARGEST}"),
        ("9" * 190, f"is above {LARGEST}"),
    ],
)
def test_nothing_else_is_an_expression(expression: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        evaluate(expression, VALUES)
    assert message in str(caught.value)


def spec_of(dimensions: Any, rule: Any, **more: Any) -> Spec:
    rules = [{"match": "a", "pattern": "shard", **rule}]
    return Spec.parse({"family": "mine", "dimensions": dimensions, "rules": rules, **more}, "mine.yaml")


def test_expressions_stand_for_numbers() -> None:
    parts = ["heads * head_dim", "kv_heads * head_dim", "(heads // group) * head_dim"]
    dimensions = {"group": "heads // kv_heads", **VALUES}
    spec = spec_of(dimensions, {"parts": parts, "heads": ["heads", "kv_heads", 2], "shape": ["3 * heads", 7]})
    assert spec.patterns(["a"]) == {"a": Shard(parts=(128, 32, 32), heads=(8, 2, 2))}
    assert spec.rules[0].shape == (24, 7)
    assert spec_of(VALUES, {"widths": ["heads", "heads + 1"]}).patterns(["a"]) == {"a": Shard(widths=(8, 9))}
    padded = spec_of(VALUES, {"vocabulary": True, "pad_to_multiple": "heads * 16"}).patterns(["a"])
    assert padded == {"a": Shard(vocabulary=True, pad_to_multiple=128)}


@pytest.mark.parametrize(
    ("dimensions", "rule", "line"),
    [
        (VALUES, {"parts": ["head * 2", 1]}, "rules[0].parts[0]: 'head' in 'head * 2' isn't a dimension"),
        ({}, {"parts": ["head * 2", 1]}, "rules[0].parts[0]: 'head' in 'head * 2' isn't a dimension; there are none"),
        (VALUES, {"parts": ["heads - 8", 1]}, "rules[0].shard: parts must be positive: (0, 1)"),
        (VALUES, {"pad_to_multiple": "heads ** 2"}, "rules[0].pad_to_multiple: 'heads ** 2' in"),
        (VALUES, {"shape": ["heads -"]}, "rules[0].shape[0]: 'heads -' isn't an expression"),
        (VALUES, {"shape": ["8"]}, "rules[0].shape[0]: an extent is a number from 0 or an expression, not '8'"),
        (VALUES, {"shape": ["heads - 9"]}, "rules[0].shape[0]: an extent is a number from 0 or"),
        (VALUES, {"shape": [True]}, "rules[0].shape[0]: an extent is a number"),
        ({"free": None}, {"shape": ["free * nothing"]}, "rules[0].shape[0]: 'nothing' in 'free * nothing' isn't a dim"),
        ({"free": None}, {"shape": ["free ** 2"]}, "rules[0].shape[0]: 'free ** 2' in 'free ** 2' isn't an integer"),
        ({"free": None}, {"parts": ["free", 1]}, "rules[0].parts[0]: 'free' in 'free' isn't a dimension; there are none"),
        ({"free": None, "a": "2 * free"}, {}, "dimensions.free: it has no value of its own"),
        ({"a": "b", "b": "c + 1", "c": "b"}, {}, "dimensions.b: b → c → b goes round in a circle"),
        ({"a": "a"}, {}, "dimensions.a: a → a goes round in a circle"),
        ({"a": "4 - 4"}, {}, "dimensions.a: a dimension is a positive number, not 0"),
        ({"a": "x"}, {}, "dimensions.a: 'x' in 'x' isn't a dimension; there are a"),
        ({"a": 0}, {}, "dimensions.a"),
        ({"a": True}, {}, "dimensions.a"),
        ({"a": 1.0}, {}, "dimensions.a"),
        ({"a b": 1}, {}, "dimensions.a b"),
        ({"a": {"config": "x"}}, {}, "dimensions.a: the spec names no file with 'config' from which 'x' could be read"),
        ({"a": {"key": "x"}}, {}, "dimensions.a"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_its_place(dimensions: Any, rule: Any, line: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(dimensions, rule)
    assert str(caught.value).startswith("spec mine.yaml is not valid (")
    assert f"\n  {line}" in str(caught.value)


CONFIGURED = """\
family: mine
config: model/config.json
dimensions:
  heads: {config: text.num_attention_heads}
  kv_heads: {config: num_key_value_heads, default: heads}
rules:
  - {match: a, pattern: shard, parts: [heads, kv_heads, kv_heads]}
"""


def configured(tmp_path: Path, content: str) -> Spec:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    (tmp_path / "mine.yaml").write_text(CONFIGURED)
    return load_spec(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(("config", "parts"), [({}, (6, 6, 6)), ({"num_key_value_heads": 2}, (6, 2, 2))], ids=str)
def test_dimensions_of_the_models_configuration(config: Any, parts: Any, tmp_path: Path) -> None:
    """The file is found from the spec's folder."""
    spec = configured(tmp_path, json.dumps({"text": {"num_attention_heads": 6}, **config}))
    assert spec.patterns(["a"]) == {"a": Shard(parts=parts)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "dimensions.heads: 'text.num_attention_heads' in the model's configuration is missing, no integer"),
        ('{"text": {"num_attention_heads": "6"}}', "is a str, no integer"),
        ('{"text": {"num_attention_heads": true}}', "is a bool, no integer"),
        ('{"text": {"num_attention_heads": -6}}', "dimensions.heads: a dimension is a positive number, not -6"),
        ("[]", "config.json holds no JSON object"),
        ("{", "config.json holds no JSON"),
    ],
)
def test_a_configuration_that_doesnt_say(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        configured(tmp_path, content)
    assert message in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIGURED)
    with pytest.raises(SpecError, match=r"there is no file .*config\.json"):
        load_spec(str(tmp_path / "mine.yaml"))
