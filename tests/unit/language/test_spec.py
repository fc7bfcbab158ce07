"""The grammar of spec files: what is accepted, and where a message says that something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.errors import MAX_LISTED, SpecError
from ucp_deepspeed.language import PATTERN, Spec, load_spec, spec_names
from ucp_deepspeed.layout import Partial, Pattern, Replicate, Scale, Shard, ShardGrid, Unique


def spec_of(*rules: Any) -> Spec:
    return Spec.parse({"family": "mine", "rules": list(rules)}, "mine.yaml")


GOOD = {"match": "a", "pattern": "unique"}


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (
            [{"match": "a", "pattern": "shardd"}],
            ["rules[0]: ", "'shardd'", "'unique', 'replicate', 'partial', 'shard', 'shard_grid'"],
        ),
        ([GOOD, {"match": "a", "pattern": "shard", "dimm": 1}], ["rules[1].shard.dimm: unknown key"]),
        (
            [GOOD, GOOD, {"match": "a", "pattern": "shard", "dim": "zero"}],
            ["rules[2].shard.dim: ", "expected a whole number"],
        ),
        ([{"match": "a", "pattern": "shard", "dim": 1.5}], ["rules[0].shard.dim: ", "expected a whole number"]),
        ([{"match": "a", "pattern": "unique", "dim": 0}], ["rules[0].unique.dim: unknown key"]),
        ([{"match": "a", "pattern": "shard", "dim": -1}], ["rules[0].shard: ", "dim must not be negative: -1"]),
        ([{"match": "a", "pattern": "shard", "parts": [1, 0]}], ["rules[0].shard: ", "parts must be positive"]),
        ([{"match": "a", "pattern": "shard", "parts": 2}], ["rules[0].shard.parts: "]),
        ([{"match": "a", "pattern": "replicate", "scale": {"factor": "two"}}], ["rules[0].replicate.scale.factor: "]),
        ([{"match": "a"}], ["rules[0].pattern: is missing"]),
        ([{"pattern": "unique"}], ["rules[0].match: is missing"]),
        ([{"match": [], "pattern": "unique"}], ["rules[0].match: ", "expected 1 or more"]),
        ([{"match": [3], "pattern": "unique"}], ["rules[0].match[0]: ", "expected a text (found 3)"]),
        ([{"match": {}, "pattern": "unique"}], ["rules[0].match: "]),
        ([7], ["rules[0]: "]),
    ],
)
def test_wrong_rules_are_placed(raw: list[Any], lines: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(*raw)
    message = str(caught.value)
    assert message.startswith("spec mine.yaml is not valid (")
    for line in lines:
        assert line in message
    assert "\n  rules: " not in message


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"rules": [GOOD]}, "family: is missing"),
        ({"family": "x"}, "rules: is missing"),
        ({"family": "x", "rules": []}, "rules: expected 1 or more"),
        ({"family": "x", "rules": [GOOD], "ruls": 1}, "ruls: unknown key"),
        ({"family": 3, "rules": [GOOD]}, "family: expected a text (found 3)"),
        ([GOOD], "top level: "),
        (None, "top level: "),
    ],
)
def test_wrong_top_level(raw: Any, line: str) -> None:
    with pytest.raises(SpecError, match=r"f\.yaml is not valid") as caught:
        Spec.parse(raw, "f.yaml")
    assert f"\n  {line}" in str(caught.value)


def test_every_problem_is_listed() -> None:
    with pytest.raises(SpecError) as caught:
        spec_of({"match": "a", "pattern": "nope"}, GOOD, {"match": "b", "pattern": "shard", "dim": "x"})
    assert "rules[0]: " in str(caught.value) and "rules[2].shard.dim: " in str(caught.value)


@pytest.mark.parametrize(
    ("glob", "fits", "misses"),
    [
        ("a.*.b", ["a.0.b", "a.12.b", "a..b"], ["a.0.1.b", "a.b", "xa.0.b", "a.0.bx", "a.0.b.c"]),
        ("a.**.b", ["a.0.b", "a.0.1.b"], ["a.b", "b.0.b"]),
        ("**", ["a", "a.b", ""], []),
        ("*", ["a", ""], ["a.b"]),
        ("layer_*.w", ["layer_1.w", "layer_.w"], ["layer_1.2.w"]),
        ("a.b", ["a.b"], ["axb", "a.b\n"]),
        ("a[1]+(b)", ["a[1]+(b)"], ["a1b", "a1"]),
        ("**.weight", [".weight", "a.b.weight"], ["weight", "a.weightx"]),
    ],
)
def test_globs(glob: str, fits: list[str], misses: list[str]) -> None:
    spec = spec_of({"match": glob, "pattern": "unique"})
    assert [name for name in fits if not spec.matches(name)] == []
    assert [name for name in misses if spec.matches(name)] == []


def test_a_question_mark_is_no_wildcard() -> None:
    with pytest.raises(SpecError, match=r"rules\[1\]\.match: .*\? in 'layers\.\?\.w' is no wildcard: write \* for"):
        spec_of(GOOD, {"match": ["a", "layers.?.w"], "pattern": "unique"})


def test_unmatched_parameters_are_all_listed_with_the_nearest_globs() -> None:
    spec = spec_of(
        {"match": ["model.norm.weight", "model.up.weight"], "pattern": "replicate"},
        {"match": "quite.another.thing", "pattern": "partial"},
    )
    with pytest.raises(SpecError) as caught:
        spec.patterns(["model.norm.weight", "model.norm.weigth", "model.up.weights"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "spec 'mine' doesn't give exactly one rule for each parameter (2):"
    assert lines[1] == "  model.norm.weigth: matches no rule; nearest: model.norm.weight, model.up.weight"
    assert lines[2] == "  model.up.weights: matches no rule; nearest: model.up.weight, model.norm.weight"
    assert lines[3].startswith("correct the rules") and len(lines) == 4 and len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim: true", "rules[0].shard.dim: expected a whole number (found "),
        ("dim: '0'", "rules[0].shard.dim: expected a whole number (found "),
        ("dim: 0.0", "rules[0].shard.dim: expected a whole number (found "),
        ("parts: ['1', 1]", "rules[0].shard.parts[0]: expected a whole number (found "),
        ("vocabulary: 1", "rules[0].shard.vocabulary: expected true or false (found 1)"),
        ("dim: 0, dim: 1", "key 'dim' stands twice"),
    ],
)
def test_nothing_is_taken_for_something_else(text: str, message: str, tmp_path: Path) -> None:
    """YAML's booleans and strings aren't numbers, and of two equal keys none is the right one."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"family: mine\nrules:\n  - {{match: '**', pattern: shard, {text}}}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", r"mine\.yaml is not YAML: "),
        (b"family: x\nfamily: y", r"mine\.yaml, line 2 is not YAML: key 'family' stands twice"),
        (b"family: x\nrules: !!map 3", r"mine\.yaml, line 2 is not YAML: expected a mapping"),
        (b"family: 2020-13-45", r"mine\.yaml is not YAML: month must be"),
        (b"family: " + b"[" * 10_000, r"mine\.yaml is not YAML: maximum recursion"),
    ],
)
def test_a_spec_that_cant_be_read(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(SpecError, match=reason):
        load_spec(str(tmp_path / "mine.yaml"))


def test_a_mapping_may_take_over_another(tmp_path: Path) -> None:
    """A key of its own goes before one that it takes over: it stands there once."""
    path, rules = tmp_path / "mine.yaml", "  - &a {match: x, pattern: shard, dim: 1}\n  - {<<: *a, match: y}\n"
    path.write_text(f"family: mine\nrules:\n{rules}")
    assert load_spec(str(path)).patterns(["x", "y"]) == {"x": Shard(1), "y": Shard(1)}


def test_ambiguous_parameters_are_listed_with_their_globs() -> None:
    spec = spec_of({"match": ["a.*", "z"], "pattern": "unique"}, {"match": "*.b", "pattern": "partial"})
    with pytest.raises(SpecError, match=r"a\.b: matches 2 rules \(a\.\*, \*\.b\)"):
        spec.patterns(["a.b", "a.c", "z"])


def test_two_globs_of_one_rule_are_one_rule() -> None:
    assert spec_of({"match": ["a.*", "*.b"], "pattern": "partial"}).patterns(["a.b"]) == {"a.b": Partial()}


def test_long_lists_are_cut_and_counted() -> None:
    with pytest.raises(SpecError, match="… and 7 more") as caught:
        spec_of(GOOD).patterns([f"p{index}" for index in range(MAX_LISTED + 7)])
    assert len(str(caught.value).splitlines()) == MAX_LISTED + 3


def test_coverage() -> None:
    spec = spec_of({"match": ["a", "b"], "pattern": "unique"}, {"match": "b", "pattern": "partial"})
    assert spec.coverage(["a", "b", "c", "a"]) == 0.5
    assert spec.coverage([]) == 0.0


PATTERNS: list[Pattern] = [
    Unique(),
    Partial(),
    Replicate(),
    Replicate(scale=Scale()),
    Replicate(scale=Scale(powers={"fp32": 1, "exp_avg": -1})),
    Shard(),
    Shard(1),
    Shard(parts=(2, 1, 1)),
    Shard(widths=(3, 2)),
    Shard(vocabulary=True, pad_to_multiple=128),
    Shard(parts=(4, 1, 1), heads=(8, 2, 2)),
    ShardGrid((0, 1), ((2, 1), (2, 2))),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_survive_json(pattern: Pattern) -> None:
    again = PATTERN.validate_json(PATTERN.dump_json(pattern))
    assert again == pattern and type(again) is type(pattern)
    assert PATTERN.validate_python(PATTERN.dump_python(pattern, mode="json")) == pattern


def test_family_or_file(tmp_path: Path) -> None:
    path = tmp_path / "run+v1[a].yaml"
    path.write_text("family: own\nrules:\n  - {match: '**', pattern: shard, dim: 1}\n", encoding="utf-8")
    assert load_spec(str(path)).patterns(["x.y"]) == {"x.y": Shard(1)}
    for name in spec_names():
        assert load_spec(name).family == name


@pytest.mark.parametrize(
    ("content", "part"),
    [("rules: [", "is not YAML"), ("", "top level"), ("family: x\nrules: 3\n", "rules: "), ("- 1", "top level")],
)
def test_files_that_are_no_specs(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load_spec(str(path))
    assert part in str(caught.value) and str(path) in str(caught.value)


def test_unknown_family_lists_the_known() -> None:
    with pytest.raises(SpecError, match="no family or spec file 'lama'; families: ") as caught:
        load_spec("lama")
    assert all(name in str(caught.value) for name in spec_names())
