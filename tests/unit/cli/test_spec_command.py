"""``ucp spec``: specs against checkpoints of two tensor-parallel ranks, written by brute force."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed.cli import main
from ucp_deepspeed.language import PATTERN, Spec, load_spec, spec_names
from ucp_deepspeed.layout import Partial, Pattern, Replicate, Scale, Shard
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train

ROOT = Path(__file__).parents[3]

Ucp = Callable[..., Result]

SHAPES: dict[str, tuple[tuple[int, ...], Cut]] = {
    "embed.weight": ((10, 4), "rows"),
    "layers.{n}.up.weight": ((8, 4), "rows"),
    "layers.{n}.up.bias": ((8,), "rows"),
    "layers.{n}.gate_up.weight": ((12, 4), "gate_up"),
    "layers.{n}.down.weight": ((4, 6), "columns"),
    "layers.{n}.down.bias": ((4,), "replicated"),
    "norm.weight": ((4,), "replicated"),
}

RIGHT = """\
family: mine
rules:
  - {match: [embed.weight, layers.*.up.*], pattern: shard, dim: 0}
  - match: layers.*.gate_up.weight
    pattern: shard
    dim: 0
    parts: [1, 1]
  - {match: layers.*.down.weight, pattern: shard, dim: 1}
  - {match: [layers.*.down.bias, norm.weight], pattern: replicate}
names:
  wrapped:
    - {from: "module.**", to: "**"}
"""


def model_of(seed: int = 3, scaled: int = 1, shapes: Mapping[str, tuple[tuple[int, ...], Cut]] = SHAPES) -> NativeModel:
    """Two layers of the shapes above; the biases that no rank cuts are divided by ``scaled``."""
    generator = torch.Generator().manual_seed(seed)
    names = [name.format(n=n) for name in shapes for n in (range(2) if "{n}" in name else (0,))]
    parameters = []
    for name in names:
        shape, cut = shapes[name.replace(".0.", ".{n}.").replace(".1.", ".{n}.")]
        value = torch.randn(shape, generator=generator) / (scaled if name.endswith("down.bias") else 1)
        states = {key: torch.randn(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        parameters.append(NativeParameter(name, value, states, cut=cut))
    return NativeModel(tuple(parameters))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_native(tmp_path / "two", model_of(), NativeRun(tp=2, dp=2, stage=1))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """The same state on one tensor-parallel rank."""
    return write_native(tmp_path / "one", model_of(), NativeRun(dp=2, stage=2))


@pytest.fixture
def right(tmp_path: Path) -> Path:
    path = tmp_path / "right.yaml"
    path.write_text(RIGHT)
    return path


def findings(result: Result) -> list[dict[str, Any]]:
    return json.loads(result.stdout)["findings"]


def test_list(ucp: Ucp) -> None:
    shown = ucp("spec", "list").stdout
    for name in spec_names():
        assert name in shown and load_spec(name).description in shown
    assert set(json.loads(ucp("spec", "list", "--json").stdout)) == set(spec_names())


def test_how_well_families_fit(tmp_path: Path, two: Path, ucp: Ucp) -> None:
    none = ucp("spec", "list", "--against", two, "--json")
    assert (none.exit_code, json.loads(none.stdout)["confidence"]) == (1, "none")
    layer = "decoder.layers.{n}.mlp.linear_"
    shapes: dict[str, tuple[tuple[int, ...], Cut]] = {
        "decoder.final_layernorm.weight": ((4,), "replicated"),
        "decoder.layers.{n}.self_attention.linear_qkv.weight": ((12, 4), "rows"),
        f"{layer}fc1.weight": ((12, 4), "gate_up"),
        f"{layer}fc2.weight": ((4, 6), "columns"),
    }
    path = write_native(tmp_path / "llama", model_of(shapes=shapes), NativeRun(tp=2, stage=1))
    report = json.loads(ucp("spec", "list", "--against", path, "--json").stdout)
    assert report["confidence"] == "shapes" and report["unconfirmed"] == []
    assert next(iter(report["families"])) == "megatron_core_llama"
    shown = ucp("spec", "list", "--against", path)
    assert shown.exit_code == 0 and "one family fits, and shapes confirm it" in shown.stdout
    assert "megatron_core_gpt: all names match, 2 shapes don't; " in shown.stdout
    # The same decides which layouts are used where no spec is named.
    inspected = json.loads(ucp("inspect", path, "--json").stdout)
    assert inspected["parameters"]["decoder.layers.0.mlp.linear_fc1.weight"]["pattern"].endswith("in parts 1:1")


def test_a_load_refuses_shapes_that_the_spec_denies(two: Path, right: Path, ucp: Ucp) -> None:
    """Declared along the wrong dimension the matrix would be joined to [8, 3], and every byte be kept."""
    right.write_text(RIGHT.replace(DOWN, "down.weight, pattern: shard, dim: 0, shape: [4, 6]"))
    result = ucp("inspect", two, "--spec", right)
    assert result.exit_code == 2
    assert "layers.0.down.weight: shard on dimension 0; logical shape [8, 3]; the rule states [4, 6]" in result.stderr
    right.write_text(RIGHT.replace(DOWN, f"{DOWN}, shape: [4, 6]"))
    assert ucp("inspect", two, "--spec", right).exit_code == 0


def test_a_right_spec(two: Path, one: Path, right: Path, ucp: Ucp) -> None:
    result = ucp("spec", "check", right, "--against", two, "--strict", "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["sound"], report["findings"], report["unused"]) == (0, True, [], [])
    assert report["parameters"]["layers.1.gate_up.weight"] == {
        "own_name": "layers.1.gate_up.weight",
        "rules": [
            {"rule": 1, "glob": "layers.*.gate_up.weight", "line": 4, "pattern": "shard on dimension 0 in parts 1:1"}
        ],
        "local_shapes": [[6, 4], [6, 4]],
        "shape": [12, 4],
    }
    assert report["values_compared"] == 12 and report["single_rank"] == "no"
    assert (
        json.loads(ucp("spec", "check", right, "--against", two, "--no-values", "--json").stdout)["values_compared"]
        == 0
    )
    compared = ucp("spec", "check", right, "--against", two, "--single-rank", one, "--json")
    assert compared.exit_code == 0 and json.loads(compared.stdout)["single_rank"] == "values"


def test_for_people(two: Path, right: Path, ucp: Ucp) -> None:
    right.write_text(RIGHT.replace("norm.weight]", "nrom.weight]"))
    result = ucp("spec", "check", right, "--against", two)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[2] == "verdict   1 contradiction"
    assert lines[3] == "compared  names and shapes of 12 parameters, values of 11"
    assert lines[4].startswith("  norm.weight: matches no rule; nearest: nrom.weight, ")
    [row] = [line for line in lines if line.startswith("layers.0.down.weight")]
    assert row.split(maxsplit=1)[1].startswith("layers.*.down.weight (line 8)")
    assert lines[-1] == "note: globs that fit nothing: nrom.weight (line 9)"


DOWN = "down.weight, pattern: shard, dim: 1"
NORM = "norm.weight], pattern: replicate"
WRONG_RULES = {
    "no such dimension": ("up.*], pattern: shard, dim: 0", "up.*], pattern: shard, dim: 1", "shapes"),
    "wrong dimension, beside a bias": (DOWN, "down.weight, pattern: shard, dim: 0", "bias"),
    "replicate where values differ": (DOWN, "down.weight, pattern: replicate", "values"),
    "shard of copies": (NORM, "norm.weight], pattern: shard, dim: 0", "values"),
    "partial where it is cut": (DOWN, "down.weight, pattern: partial", "values"),
    "kv heads that differ": (DOWN, "down.weight, pattern: shard, dim: 1, heads: [1]", "values"),
    "parts that don't divide": ("parts: [1, 1]", "parts: [2, 1, 4]", "shapes"),
    "a shape that it isn't": (DOWN, f"{DOWN}, shape: [4, 4]", "shapes"),
    "ambiguous": ("[embed.weight, ", "[embed.*, embed.weight, norm.*, ", "ambiguous"),
    "unmatched": ("embed.weight", "embedding.weight", "unmatched"),
    "unique": (NORM, "norm.weight], pattern: unique", "shapes"),
}


@pytest.mark.parametrize(("old", "new", "what"), WRONG_RULES.values(), ids=WRONG_RULES.keys())
def test_a_wrong_rule_is_caught(old: str, new: str, what: str, two: Path, right: Path, ucp: Ucp) -> None:
    assert old in RIGHT
    right.write_text(RIGHT.replace(old, new))
    result = ucp("spec", "check", right, "--against", two, "--json")
    assert result.exit_code == 1
    assert what in {finding["what"] for finding in findings(result) if finding["wrong"]}


GATE_UP = "    dim: 0\n    parts: [1, 1]\n"
OTHERWISE = "joined that way it isn't what it is without tensor parallelism"
WHOLE_ONLY = {
    "fused declared plain": ("    dim: 0\n", OTHERWISE),
    "other parts": ("    dim: 0\n    parts: [1, 1, 1]\n", OTHERWISE),
    "wrong dimension": ("    dim: 1\n", "without tensor parallelism it is [12, 4]"),
}


@pytest.mark.parametrize(("fields", "detail"), WHOLE_ONLY.values(), ids=WHOLE_ONLY.keys())
def test_what_only_a_single_rank_tells(fields: str, detail: str, two: Path, one: Path, right: Path, ucp: Ucp) -> None:
    """By itself the checkpoint holds no evidence: the same shapes, other values."""
    assert GATE_UP in RIGHT
    right.write_text(RIGHT.replace(GATE_UP, fields))
    assert ucp("spec", "check", right, "--against", two).exit_code == 0
    result = ucp("spec", "check", right, "--against", two, "--single-rank", one, "--json")
    assert result.exit_code == 1
    wrong = findings(result)
    assert {finding["parameter"] for finding in wrong} == {f"layers.{n}.gate_up.weight" for n in range(2)}
    assert all(finding["what"] == "whole" and detail in finding["detail"] for finding in wrong)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Megatron-Core model's state as DeepSpeed saved it on two ranks, and as one rank loaded and saved it with the package."""
    root = tmp_path_factory.mktemp("megatron")
    two, one = root / "two", root / "one"
    get_pool(2).run(train, Run("llama", tp=2, universal=None), 1, save=str(two), save_tag="step")
    universal = {"enabled": True, "load": "always"}
    get_pool(1).run(
        train, Run("llama", tp=1, universal=universal), 1, load=str(two), save=str(one), save_tag="step", timeout=280
    )
    return two, one


def test_a_single_rank_whose_manifest_records_cuts(megatron: tuple[Path, Path], tmp_path: Path, ucp: Ucp) -> None:
    """The manifest's record of more ranks contradicts nothing that one rank holds; its values tell as others do."""
    two, one = megatron
    patterns = {
        name: entry["pattern"]
        for name, entry in json.loads((one / "step" / "ucp_manifest.json").read_text())["parameters"].items()
    }
    fused, cut = ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight")
    assert (patterns[fused]["parts"], patterns[cut]["pattern"], patterns[cut]["dim"]) == ([1, 1], "shard", 1)
    result = ucp("spec", "check", "megatron_core_llama", "--against", two, "--single-rank", one, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["single_rank"] == "values"
    wrong = yaml.safe_load((ROOT / "configs" / "megatron_core_llama.yaml").read_text())
    [rule] = [rule for rule in wrong["rules"] if "parts" in rule]
    del rule["parts"]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    result = ucp("spec", "check", tmp_path / "wrong.yaml", "--against", two, "--single-rank", one, "--json")
    assert result.exit_code == 1
    assert {one["parameter"] for one in findings(result) if one["wrong"]} == {fused, fused.replace(".0.", ".1.")}
    spec = inferred(ucp("spec", "infer", two, "--single-rank", one), tmp_path / "new.yaml")
    assert spec.patterns([fused, cut]) == {fused: Shard(0, parts=(1, 1)), cut: Shard(1)}


def test_copies_updated_apart_are_partial(two: Path, tmp_path: Path, right: Path, ucp: Ucp) -> None:
    """Against a cut matrix, whose shares have nothing in common: that is one of `WRONG_RULES`."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(6, 4, generator=generator)
    copies = [start + 0.2 * torch.randn(6, 4, generator=generator) for _ in range(2)]
    value = NativeParameter("norm.weight", torch.cat(copies), {"exp_avg": torch.zeros(12, 4)}, cut="rows")
    path = write_native(tmp_path / "partial", NativeModel((value,)), NativeRun(tp=2, stage=1))
    right.write_text("family: mine\nrules:\n  - {match: norm.weight, pattern: partial}\n")
    result = ucp("spec", "check", right, "--against", path, "--json")
    assert (result.exit_code, findings(result)) == (0, [])


def test_another_state_of_a_single_rank_tells_by_shapes(two: Path, right: Path, tmp_path: Path, ucp: Ucp) -> None:
    other = write_native(tmp_path / "other", model_of(seed=4), NativeRun(stage=1))
    result = ucp("spec", "check", right, "--against", two, "--single-rank", other, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["single_rank"] == "shapes"
    right.write_text(RIGHT.replace("    parts: [1, 1]\n", ""))
    assert ucp("spec", "check", right, "--against", two, "--single-rank", other).exit_code == 0
    refused = ucp("spec", "check", right, "--against", two, "--single-rank", two)
    assert refused.exit_code == 2 and "is of 2 tensor-parallel ranks" in refused.stderr


def test_a_missing_scale(one: Path, right: Path, tmp_path: Path, ucp: Ucp) -> None:
    """AutoTP stores a row-parallel bias divided by the degree."""
    scaled = write_native(tmp_path / "scaled", model_of(scaled=2), NativeRun(tp=2, stage=1))
    assert ucp("spec", "check", right, "--against", scaled).exit_code == 0
    result = ucp("spec", "check", right, "--against", scaled, "--single-rank", one, "--json")
    assert {finding["parameter"] for finding in findings(result)} == {f"layers.{n}.down.bias" for n in range(2)}
    rules = (
        "  - {match: layers.*.down.bias, pattern: replicate, scale: {}}\n  - {match: norm.weight, pattern: replicate}\n"
    )
    right.write_text(RIGHT.replace("  - {match: [layers.*.down.bias, norm.weight], pattern: replicate}\n", rules))
    result = ucp("spec", "check", right, "--against", scaled, "--single-rank", one, "--json")
    assert (result.exit_code, findings(result)) == (0, [])


def test_what_was_recorded(two: Path, right: Path, ucp: Ucp) -> None:
    record(two, {"layers.0.gate_up.weight": {"pattern": "shard", "dim": 0, "parts": [1, 1]}})
    assert ucp("spec", "check", right, "--against", two).exit_code == 0
    right.write_text(RIGHT.replace("    parts: [1, 1]\n", ""))
    result = ucp("spec", "check", right, "--against", two, "--json")
    [finding] = findings(result)
    assert (result.exit_code, finding["what"], finding["parameter"]) == (1, "record", "layers.0.gate_up.weight")
    assert "(layers.*.gate_up.weight (line 4)); recorded was shard on dimension 0 in parts 1:1" in finding["detail"]


def record(folder: Path, patterns: Mapping[str, Any]) -> None:
    """Add a manifest with patterns."""
    add_manifest(folder, model_of(), NativeRun(tp=2, dp=2, stage=1))
    path = folder / "ucp_manifest.json"
    manifest = json.loads(path.read_text())
    for name, pattern in patterns.items():
        manifest["parameters"][name] = {"pattern": pattern}
    path.write_text(json.dumps(manifest))


def test_a_vocabulary_of_unknown_size_is_remarked(two: Path, right: Path, ucp: Ucp) -> None:
    rules = "  - {match: embed.weight, pattern: shard, dim: 0, vocabulary: true}\n  - {match: layers.*.up.*,"
    right.write_text(RIGHT.replace("  - {match: [embed.weight, layers.*.up.*],", rules))
    args = ("spec", "check", right, "--against", two)
    result = ucp(*args, "--json")
    assert result.exit_code == 0
    [finding] = findings(result)
    assert finding["detail"] == "the vocabulary's size isn't known: all 10 rows are kept" and not finding["wrong"]
    assert ucp(*args, "--strict").exit_code == 1
    assert ucp(*args, "--strict", "--vocabulary-size", 9).exit_code == 0
    too_large = ucp(*args, "--vocabulary-size", 11, "--json")
    assert too_large.exit_code == 1 and findings(too_large)[0]["what"] == "shapes"


def test_an_uneven_cut_is_remarked(tmp_path: Path, right: Path, ucp: Ucp) -> None:
    """Two parts of 5 rows each on two ranks are 6 and 4 rows, and so is no even cut of 10."""
    shapes: dict[str, tuple[tuple[int, ...], Cut]] = {"fused.weight": ((10, 3), "gate_up")}
    path = write_native(tmp_path / "uneven", model_of(shapes=shapes), NativeRun(tp=2, stage=1))
    right.write_text("family: mine\nrules:\n  - {match: fused.weight, pattern: shard, dim: 0}\n")
    result = ucp("spec", "check", right, "--against", path, "--json")
    assert [one["detail"] for one in findings(result)] == [
        "the ranks hold [6, 4], which is no even cut, and 2 fused parts would be"
    ]
    right.write_text("family: mine\nrules:\n  - {match: fused.weight, pattern: shard, dim: 0, parts: [1, 1]}\n")
    assert ucp("spec", "check", right, "--against", path, "--strict").exit_code == 0


@pytest.mark.parametrize("command", [("check", "RIGHT", "--against"), ("infer",)])
def test_progress_in_a_log(
    command: tuple[str, ...], two: Path, one: Path, right: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucp_deepspeed.tunables.TOLD_SECONDS", 0.0)
    result = ucp("spec", *[right if word == "RIGHT" else word for word in command], two, "--single-rank", one)
    assert result.exit_code == 0
    # two ranks' shares of the vocabulary of 10 rows of 4 numbers in three states come first
    assert result.stderr.startswith(f"spec {command[0]}: 480 B of 3.4 KiB (14%), ")


def test_explain(two: Path, right: Path, ucp: Ucp) -> None:
    report = json.loads(
        ucp("spec", "explain", "layers.1.gate_up.weight", "--spec", right, "--against", two, "--json").stdout
    )
    assert (report["scheme"], report["problem"], report["shape"]) == (None, None, [12, 4])
    assert report["ranks"][1]["pieces"] == [
        {"logical": [[3, 6], [0, 4]], "local": [[0, 3], [0, 4]]},
        {"logical": [[9, 12], [0, 4]], "local": [[3, 6], [0, 4]]},
    ]
    shown = ucp("spec", "explain", "module.norm.weight", "--spec", right).stdout.splitlines()
    assert shown == [
        "parameter module.norm.weight",
        "logical   norm.weight (by naming scheme 'wrapped')",
        "rule      norm.weight (line 9): replicate",
    ]
    shown = ucp("spec", "explain", "layers.1.down.weight", "--spec", right, "--against", two).stdout
    assert " ".join(shown.splitlines()[-1].split()) == "1 [4, 3] [0:4, 3:6] [0:4, 0:3]"


def test_explain_what_is_wrong(two: Path, right: Path, ucp: Ucp) -> None:
    result = ucp("spec", "explain", "nowhere", "--spec", right)
    assert result.exit_code == 1 and "problem   matches no rule; nearest: " in result.stdout
    result = ucp("spec", "explain", "nowhere", "--spec", right, "--against", two)
    assert result.exit_code == 2 and "holds no parameter 'nowhere'" in result.stderr
    right.write_text(RIGHT.replace("norm.weight], pattern: replicate", "norm.weight], pattern: shard, dim: 1"))
    result = ucp("spec", "explain", "norm.weight", "--spec", right, "--against", two)
    assert result.exit_code == 1 and "dimension 1 doesn't exist in shape (4,)" in result.stdout


def inferred(result: Result, path: Path) -> Spec:
    path.write_text(result.stdout)
    return load_spec(str(path))


def test_infer_by_comparison(two: Path, one: Path, tmp_path: Path, ucp: Ucp) -> None:
    """Both checkpoints have the same state: values tell which shards are fused."""
    result = ucp("spec", "infer", two, "--single-rank", one)
    assert (result.exit_code, result.stderr) == (0, "")
    spec = inferred(result, tmp_path / "new.yaml")
    assert spec.patterns(["layers.7.gate_up.weight", "layers.7.up.weight", "layers.7.down.weight"]) == {
        "layers.7.gate_up.weight": Shard(0, parts=(1, 1)),
        "layers.7.up.weight": Shard(0),
        "layers.7.down.weight": Shard(1),
    }
    assert "shapes can't tell" not in result.stdout
    checked = ucp("spec", "check", tmp_path / "new.yaml", "--against", two, "--single-rank", one, "--strict")
    assert checked.exit_code == 0, checked.stdout


def joined_and_whole(folder: Path, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Path, Path]:
    """Checkpoints of two ranks and of one, from what the two hold, one after the other, and what the one does."""
    folders = []
    for place, (name, tp) in enumerate((("two", 2), ("one", 1))):
        parameters = tuple(NativeParameter(key, held[place], {}, cut="rows") for key, held in tensors.items())
        folders.append(write_native(folder / name, NativeModel(parameters), NativeRun(tp=tp, stage=1, steps=0)))
    return folders[0], folders[1]


@pytest.fixture
def grouped(tmp_path: Path) -> tuple[Path, Path]:
    """Fused q, k and v of 4 q heads and one kv head, which both ranks hold; vocabularies of 9 and 11 words with other padding;
    and k of 3 heads, of which both ranks hold the second."""
    generator = torch.Generator().manual_seed(6)
    q, k, v, heads = (torch.randn(rows, 3, generator=generator) for rows in (8, 2, 2, 6))
    words, padding = torch.randn(11, 3, generator=generator), torch.randn(3, 3, generator=generator)
    return joined_and_whole(
        tmp_path,
        {
            "attn.qkv.weight": (torch.cat([q[:4], k, v, q[4:], k, v]), torch.cat([q, k, v])),
            "attn.k.weight": (torch.cat([heads[:4], heads[2:]]), heads),
            "few.weight": (torch.cat([words[:9], padding]), words),
            "embed.weight": (torch.cat([words, padding[:1]]), words),
            "qkv.bias": (torch.zeros(14), torch.zeros(11)),
        },
    )


def test_copies_of_kv_heads_are_told_from_padding(grouped: tuple[Path, Path], tmp_path: Path, ucp: Ucp) -> None:
    two, one = grouped
    text = ucp("spec", "infer", two, "--single-rank", one).stdout
    (tmp_path / "new.yaml").write_text(text)
    rules = {rule.pop("match"): rule for rule in yaml.safe_load(text)["rules"]}
    assert rules == {
        "attn.qkv.weight": {"pattern": "shard", "dim": 0, "parts": [4, 1, 1], "heads": [4, 1, 1]},
        "embed.weight": {"pattern": "shard", "dim": 0, "vocabulary": True},
    }
    assert (
        "as a vocabulary, only the first 9 of 11 rows" in text and "as a vocabulary, only the first 4 of 6 rows" in text
    )
    assert "attn.k.weight" in text and "qkv.bias" in text


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ([], {"attn.qkv.weight"}),
        (["--vocabulary-size", "9"], {"attn.qkv.weight"}),
        (["--vocabulary-size", "6"], {"attn.qkv.weight", "attn.k.weight"}),
        (["--vocabulary-size", "11"], {"attn.qkv.weight", "few.weight"}),
    ],
)
def test_a_vocabulary_is_compared_too(
    options: list[str], wrong: set[str], grouped: tuple[Path, Path], tmp_path: Path, ucp: Ucp
) -> None:
    two, one = grouped
    (tmp_path / "spec.yaml").write_text(
        "family: mine\nrules:\n  - {match: '*.*', pattern: shard, vocabulary: true}\n"
        "  - {match: attn.*.weight, pattern: shard, vocabulary: true}\n"
    )
    checked = ucp("spec", "check", tmp_path / "spec.yaml", "--against", two, "--single-rank", one, "--json", *options)
    found = findings(checked)
    compared = {each["parameter"] for each in found if each["wrong"] and each["what"] == "whole"}
    assert compared == wrong
    if not options:
        remarks = [each["detail"] for each in found if "--vocabulary-size" in each["detail"]]
        assert [remark.split(" rows")[0] for remark in remarks] == ["only the first 4 of 6", "only the first 9 of 11"]


def test_copies_of_kv_heads_and_padding_are_alike_by_shapes(
    grouped: tuple[Path, Path], tmp_path: Path, ucp: Ucp
) -> None:
    shapes = {"attn.qkv.weight": (12, 3), "attn.k.weight": (6, 3), "few.weight": (11, 3), "embed.weight": (11, 3)}
    parameters = [NativeParameter(name, torch.randn(shape), {}) for name, shape in shapes.items()]
    parameters.append(NativeParameter("qkv.bias", torch.zeros(11), {}))
    other = write_native(tmp_path / "other", NativeModel(tuple(parameters)), NativeRun(stage=1, steps=0))
    result = ucp("spec", "infer", grouped[0], "--single-rank", other)
    assert "a vocabulary that is padded otherwise, or q, k and v of 1 kv heads" in result.stdout
    (tmp_path / "new.yaml").write_text(result.stdout)
    checked = ucp("spec", "check", tmp_path / "new.yaml", "--against", grouped[0], "--json")
    unmatched = {each["parameter"] for each in findings(checked) if each["what"] == "unmatched"}
    assert "attn.qkv.weight" in unmatched and "embed.weight" not in unmatched


def test_infer_by_shapes_alone(two: Path, tmp_path: Path, ucp: Ucp) -> None:
    other = write_native(tmp_path / "other", model_of(seed=4), NativeRun(stage=1))
    result = ucp("spec", "infer", two, "--single-rank", other, "--family", "mine")
    spec = inferred(result, tmp_path / "new.yaml")
    assert spec.family == "mine" and spec.patterns(["layers.0.gate_up.weight"]) == {"layers.0.gate_up.weight": Shard(0)}
    assert "# shapes can't tell whether this is fused" in result.stdout
    assert ucp("spec", "check", tmp_path / "new.yaml", "--against", two, "--single-rank", other).exit_code == 0


def test_infer_a_scale_and_a_partial(one: Path, tmp_path: Path, ucp: Ucp) -> None:
    shapes: dict[str, tuple[tuple[int, ...], Cut]] = {
        "partial.weight": ((6,), "rows"),
        "down.bias": ((4,), "replicated"),
    }
    whole = model_of(shapes=shapes)
    halved = model_of(shapes=shapes, scaled=2)
    [first, second] = whole.parameters
    narrow = NativeModel((replace(first, fp32=first.fp32[:3], states={}), replace(second, states={})))
    # A frozen one is needed for no state to be missing; both parameters have none.
    single = write_native(tmp_path / "single", narrow, NativeRun(stage=1, steps=0))
    both = NativeModel(tuple(replace(parameter, states={}) for parameter in halved.parameters))
    sharded = write_native(tmp_path / "sharded", both, NativeRun(tp=2, stage=1, steps=0))
    result = ucp("spec", "infer", sharded, "--single-rank", single)
    patterns = inferred(result, tmp_path / "new.yaml").patterns(["partial.weight", "down.bias"])
    assert patterns == {"partial.weight": Partial(), "down.bias": Replicate(scale=Scale())}
    assert "each rank holds the value divided by their number" in result.stdout


def test_infer_from_the_record(two: Path, tmp_path: Path, ucp: Ucp) -> None:
    refused = ucp("spec", "infer", two)
    assert refused.exit_code == 2 and "doesn't record how 12 parameters are cut" in refused.stderr
    right = Spec.parse(yaml.safe_load(RIGHT), "right")
    names = [parameter.name for parameter in model_of().parameters]
    recorded = {name: PATTERN.dump_python(pattern, mode="json") for name, pattern in right.patterns(names).items()}
    record(two, recorded)
    spec = inferred(ucp("spec", "infer", two), tmp_path / "new.yaml")
    assert spec.patterns(names) == right.patterns(names)
    assert len(spec.rules) == 4


MEGATRON_MODEL = """
def build():
    from ucp_deepspeed.testing import megatron_models
    return megatron_models.build_megatron_gpt(megatron_models.llama_flavour())

def nothing():
    import torch
    return torch.nn.Linear(2, 2)
"""


def infer_on_rank(folder: str, function: str) -> tuple[int, str, str]:
    """On a rank: ``ucp spec infer --model``."""
    import os

    from ucp_deepspeed.testing.ranks import reset_parallel_state

    reset_parallel_state()
    from megatron.core import parallel_state

    from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu

    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(main, ["spec", "infer", "--model", f"model_of_mine:{function}"])
    finally:
        os.chdir(before)
    return result.exit_code, result.stdout, result.stderr


def test_infer_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "model_of_mine.py").write_text(MEGATRON_MODEL)
    [(status, stdout, stderr)] = get_pool(1).run(infer_on_rank, str(tmp_path), "build")
    assert status == 0, stderr
    (tmp_path / "new.yaml").write_text(stdout)
    spec, family = load_spec(str(tmp_path / "new.yaml")), load_spec("megatron_core_llama")
    names = [f"decoder.layers.{n}.mlp.linear_{fc}.weight" for n in range(2) for fc in ("fc1", "fc2")]
    expected: dict[str, Pattern] = family.patterns(names)
    assert spec.patterns(names) == expected
    for function, message in (("nothing", "carries attributes"), ("nowhere", "has no attribute 'nowhere'")):
        [(status, _, stderr)] = get_pool(1).run(infer_on_rank, str(tmp_path), function)
        assert status == 2 and message in stderr


def test_infer_wants_one_source(two: Path, ucp: Ucp) -> None:
    for args in ((), (two, "--model", "a:b")):
        result = ucp("spec", "infer", *args)
        assert result.exit_code == 2 and "name a checkpoint, or a function with --model" in result.stderr
