"""Specs against checkpoints of two tensor-parallel ranks, written by brute force: each wrong rule is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from native_files import Cut, NativeModel, NativeParameter, NativeRun, write_native
from spec_models import DOWN, RIGHT, findings, inferred, model_of, record

from ucp_deepspeed.layout import Shard
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train

Ucp = Callable[..., Result]


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
    wrong = yaml.safe_load((Path(__file__).parents[4] / "configs" / "megatron_core_llama.yaml").read_text())
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
