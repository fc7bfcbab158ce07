"""First specs, made from a checkpoint's record, from shapes and from values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import Result
from native_files import Cut, NativeModel, NativeParameter, NativeRun, write_native
from spec_models import RIGHT, findings, inferred, model_of, record

from ucp_deepspeed.language import PATTERN, Spec
from ucp_deepspeed.layout import Partial, Replicate, Scale, Shard

Ucp = Callable[..., Result]


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
