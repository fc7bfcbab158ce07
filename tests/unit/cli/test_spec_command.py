"""``ucp spec``: what its commands print, and their exit statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from native_files import Cut, NativeRun, write_native
from spec_models import DOWN, RIGHT, model_of

from ucp_deepspeed.cli import main
from ucp_deepspeed.language import load_spec, spec_names
from ucp_deepspeed.layout import Pattern
from ucp_deepspeed.testing.ranks import get_pool

Ucp = Callable[..., Result]


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
