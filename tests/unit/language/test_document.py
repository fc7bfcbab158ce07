"""``docs/language.md`` and ``docs/spec.schema.json``: what they show is what the code does."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from native_files import Cut, NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import Spec, families, load_spec, spec_names
from ucp_deepspeed.language.schema import spec_schema
from ucp_deepspeed.layout import Layout, Shape, Shard, ShardGrid, Unique
from ucp_deepspeed.layout.box import row_major_strides

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "language.md").read_text(encoding="utf-8")
PADDING = "·"


def blocks(kind: str, text: str = TEXT) -> list[str]:
    """Fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def picture(rule: str, logical_shape: Shape, degree: int) -> str:
    """The rule, then the logical tensor and each rank's local one, with a letter for each element."""
    parsed = Spec.parse({"family": "x", "rules": [{"match": "x", **yaml.safe_load(f"{{{rule}}}")}]}, "picture")
    pattern = parsed.rules[0].pattern
    layout = pattern.layout(logical_shape, pattern.local_shapes(logical_shape, degree))
    columns = [["logical", *_rows(_letters(Layout.whole(logical_shape), 0), logical_shape)]]
    for rank, local in enumerate(layout.locals):
        columns.append([f"rank {rank}", *_rows(_letters(layout, rank), local.shape)])
    height = max(map(len, columns))
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{{{rule}}}"]
    for row in range(height):
        cells = [
            (column[row] if row < len(column) else "").ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _letters(layout: Layout, rank: int) -> list[str]:
    """For each element of a local tensor the letter of the logical element, in row-major order."""
    local = layout.locals[rank]
    found = [PADDING] * prod(local.shape)
    for piece in local.pieces:
        for offset in _indices(piece.local_box.shape):
            at = _flat(tuple(map(sum, zip(piece.local_box.start, offset, strict=True))), local.shape)
            logical = _flat(tuple(map(sum, zip(piece.logical_box.start, offset, strict=True))), layout.logical_shape)
            found[at] = string.ascii_letters[logical]
    return found


def _indices(shape: Shape) -> Iterator[Shape]:
    for flat in range(prod(shape)):
        yield tuple(flat // stride % extent for stride, extent in zip(row_major_strides(shape), shape, strict=True))


def _flat(index: Shape, shape: Shape) -> int:
    return sum(place * stride for place, stride in zip(index, row_major_strides(shape), strict=True))


def _rows(letters: list[str], shape: Shape) -> list[str]:
    width = shape[-1]
    return [" ".join(letters[start : start + width]) for start in range(0, len(letters), width)] if width else []


PICTURES: list[tuple[str, Shape, int]] = [
    ("pattern: unique", (2, 3), 1),
    ("pattern: replicate", (2, 3), 2),
    ("pattern: partial", (2, 3), 2),
    ("pattern: shard, dim: 0", (4, 3), 2),
    ("pattern: shard, dim: 1", (3, 4), 2),
    ("pattern: shard, dim: 0, widths: [3, 1]", (4, 3), 2),
    ("pattern: shard, dim: 0, parts: [1, 1]", (8, 2), 2),
    ("pattern: shard, dim: 0, parts: [2, 1, 1]", (8, 2), 2),
    ("pattern: shard, dim: 0, heads: [3]", (6, 2), 2),
    ("pattern: shard, dim: 0, heads: [2]", (4, 2), 4),
    ("pattern: shard, dim: 0, parts: [2, 1, 1], heads: [4, 2, 2]", (8, 1), 4),
    ("pattern: shard_grid, dims: [0, 1], grids: [[2, 2]]", (4, 4), 4),
    ("pattern: shard, dim: 0, vocabulary: true, pad_to_multiple: 2", (5, 2), 2),
]


@pytest.mark.parametrize(("rule", "shape", "degree"), PICTURES, ids=[case[0] for case in PICTURES])
def test_pictures_show_what_the_code_does(rule: str, shape: Shape, degree: int) -> None:
    assert picture(rule, shape, degree) in blocks("text")


def test_every_picture_is_checked() -> None:
    shown = [block for block in blocks("text") if block.startswith("{pattern")]
    assert sorted(shown) == sorted(picture(*case) for case in PICTURES)


HIDDEN, FFN, VOCABULARY = 8, 12, 10
QKV_ON_TWO_RANKS = [*range(4), 8, 9, 12, 13, *range(4, 8), 10, 11, 14, 15]
"""Rows of q, k and v (8, 4 and 4 of them) in the order in which two ranks hold them."""


def heron(degree: int) -> NativeModel:
    """The worked example's model before the first step: on several ranks with a padded vocabulary."""
    generator = torch.Generator().manual_seed(11)

    def parameter(name: str, shape: Shape, cut: Cut) -> NativeParameter:
        value = torch.randn(shape, generator=generator)
        if degree > 1 and name == "embed.weight":
            value = torch.cat([value, torch.zeros(2, HIDDEN)])
        if degree > 1 and "qkv" in name:
            value = value[QKV_ON_TWO_RANKS]
        return NativeParameter(name, value, cut=cut)

    layers: list[tuple[str, Shape, Cut]] = [
        ("norm.weight", (HIDDEN,), "replicated"),
        ("attn.qkv.weight", (16, HIDDEN), "rows"),
        ("attn.out.weight", (HIDDEN, 8), "columns"),
        ("mlp.gate_up.weight", (2 * FFN, HIDDEN), "gate_up"),
        ("mlp.down.weight", (HIDDEN, FFN), "columns"),
        ("mlp.down.bias", (HIDDEN,), "replicated"),
    ]
    embedding = parameter("embed.weight", (VOCABULARY, HIDDEN), "rows")
    blocks_of = [parameter(f"layers.{layer}.{name}", shape, cut) for layer in range(2) for name, shape, cut in layers]
    return NativeModel((embedding, *blocks_of))


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Runs a command of the worked example, in a folder with its checkpoints and its spec."""
    for degree, name in ((1, "one"), (2, "two")):
        write_native(tmp_path / "runs" / name, heron(degree), NativeRun(tp=degree, stage=1, steps=0))
    [spec] = [block for block in blocks("yaml") if block.startswith("# heron.yaml\n")]
    (tmp_path / "heron.yaml").write_text(spec)
    monkeypatch.chdir(tmp_path)
    return lambda line: CliRunner().invoke(main, line.removeprefix("$ ucp ").split(), catch_exceptions=False)


def test_the_worked_example_prints_what_is_shown(example: Callable[[str], Result]) -> None:
    shown = blocks("console")
    assert len(shown) == 3
    for block in shown:
        line, _, expected = block.partition("\n")
        result = example(line)
        assert (result.exit_code, result.stderr) == (0, "")
        printed = "\n".join(part.rstrip() for part in result.stdout.splitlines())
        assert printed == expected.rstrip("\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("parts: [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]\n    heads: [heads, kv_heads, kv_heads]\n", "\n"),
        ("    parts: [1, 1]\n", ""),
        ("2 * ffn_size", "ffn_size"),
        ("kv_heads: 2", "kv_heads: 4"),
        ("layers.*.mlp.down.weight\n    pattern: shard\n    dim: 1", "layers.*.mlp.down.weight\n    pattern: shard\n    dim: 0"),
        ("layers.*.attn.out.weight\n    pattern: shard\n    dim: 1", "layers.*.attn.out.weight\n    pattern: replicate"),
        ("pattern: replicate\n", "pattern: replicate\n    scale: {}\n"),
    ],
    ids=["plain qkv", "plain gate_up", "ungated", "kv heads", "dimension", "replicate", "scale"],
)  # fmt: skip
def test_a_mistake_in_the_worked_example_is_caught(old: str, new: str, example: Callable[[str], Result]) -> None:
    path = Path("heron.yaml")
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new.strip("\n") + "\n" if new == "\n" else new))
    result = example(blocks("console")[1].splitlines()[0])
    assert result.exit_code == 1, result.stdout


def test_every_yaml_block_is_valid() -> None:
    rule = {"match": "**", "pattern": "unique"}
    for block in blocks("yaml"):
        Spec.parse({"family": "fragment", "rules": [rule], **yaml.safe_load(block)}, "language.md")


def test_the_stored_schema_is_that_of_the_models() -> None:
    stored = (DOCS / "spec.schema.json").read_text(encoding="utf-8")
    assert stored == json.dumps(spec_schema(), indent=2, ensure_ascii=False) + "\n", "run: ucp spec schema"
    assert CliRunner().invoke(main, ["spec", "schema"]).stdout == stored


def valid(value: Any, schema: Any, root: Any) -> bool:
    """JSON Schema, as far as the stored one uses it."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(valid(value, option, root) for option in schema["anyOf"])
    if "oneOf" in schema:
        return sum(valid(value, option, root) for option in schema["oneOf"]) == 1
    if "const" in schema:
        return bool(value == schema["const"])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if not isinstance(value, kinds[schema["type"]]) or (schema["type"] == "integer" and isinstance(value, bool)):
        return False
    if schema["type"] == "array":
        return len(value) >= schema.get("minItems", 0) and all(valid(item, schema["items"], root) for item in value)
    if schema["type"] == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        others = next(iter(schema.get("patternProperties", {}).values()), others)
        inside = all(
            valid(item, known[key], root) if key in known else others and (others is True or valid(item, others, root))
            for key, item in value.items()
        )
        return bool(inside and set(schema.get("required", ())) <= value.keys())
    return True


@pytest.mark.parametrize("name", spec_names())
def test_shipped_specs_follow_the_schema_and_name_it(name: str) -> None:
    [path] = [one for one in families.spec_folder().glob("*.yaml") if load_spec(str(one)).family == name]
    text = path.read_text(encoding="utf-8")
    schema = spec_schema()
    assert valid(yaml.safe_load(text), schema, schema)
    [line] = [line for line in text.splitlines() if line.startswith("# yaml-language-server: $schema=")]
    assert (path.parent / line.partition("=")[2]).resolve() == DOCS / "spec.schema.json"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"parts": ["2 * heads", 1]}, True),
        ({"shape": [None, "heads", 3]}, True),
        ({"match": ["a", "b"]}, True),
        ({"match": []}, False),
        ({"dimm": 1}, False),
        ({"dim": "0"}, False),
        ({"vocabulary": 1}, False),
        ({"pattern": "shardd"}, False),
        ({"dims": [0, 1]}, False),
        ({"pad_to_multiple": "8 * heads"}, True),
    ],
    ids=str,
)
def test_the_schema_says_what_the_models_accept(change: dict[str, Any], expected: bool) -> None:
    raw = {"family": "x", "dimensions": {"heads": 4}, "rules": [{"match": "a", "pattern": "shard", "dim": 0, **change}]}
    schema = spec_schema()
    assert valid(raw, schema, schema) is expected
    try:
        Spec.parse(raw, "x.yaml")
    except SpecError:
        assert not expected
    else:
        assert expected


def test_no_pattern_is_missing_from_the_document() -> None:
    for kind in (Unique, Shard, ShardGrid):
        assert f"### {kind.__dataclass_fields__['pattern'].default}\n" in TEXT
    for field in Shard.__dataclass_fields__:
        assert f"`{field}" in TEXT or f"{field}:" in TEXT
