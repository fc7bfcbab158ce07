"""``ucp diff``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native

Ucp = Callable[..., Result]


def test_equal(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    assert ucp("convert", saved, tmp_path / "u").exit_code == 0
    result = ucp("diff", saved, tmp_path / "u", "--chunk", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    size = 3 * 4 * 3252 + 2 * 33 + 4 * 20 + 8
    assert result.stdout == f"equal: 10 parameters, 24 states, {size} bytes\n"


def test_different(saved: Path, ucp: Ucp) -> None:
    result = ucp("diff", saved, saved, "--tag-a", "step2", "--limit", 200)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"different: {len(lines) - 1} differences (")
    assert any(line.startswith("  embedding.weight/fp32: ") and "elements differ, first at [" in line for line in lines)
    assert "  norm.weight: step is 2.0 in A, 3.0 in B" in lines
    assert "  global_steps: 2 in A, 3 in B" in lines
    assert "  lr_scheduler: last_batch_iteration is 1 in A, 2 in B" in lines
    assert any(line.startswith("  norm.bias: lr is ") for line in lines)


def test_the_first_differences_only(saved: Path, ucp: Ucp) -> None:
    every = ucp("diff", saved / "step2", saved, "--limit", 200).stdout.splitlines()
    some = ucp("diff", saved / "step2", saved, "--limit", 3).stdout.splitlines()
    assert some[:4] == every[:4] and len(some) == 5
    assert some[4] == f"  … and {len(every) - 4} more"


def test_one_object(saved: Path, ucp: Ucp) -> None:
    report = json.loads(ucp("diff", saved, saved, "--json").stdout)
    size = 3 * 4 * 3252 + 2 * 33 + 4 * 20 + 8
    side = {"path": str(saved / "step3"), "form": "deepspeed zero-1/2"}
    held = {"parameters": 10, "states": 24, "bytes": size}
    assert report == {"a": side, "b": side, "equal": True, "held": held, "differences": []}
    different = ucp("diff", saved / "step2", saved, "--json")
    report = json.loads(different.stdout)
    assert (different.exit_code, report["equal"]) == (1, False)
    plain = ucp("diff", saved / "step2", saved, "--limit", 200).stdout.splitlines()[1:]
    found = report["differences"]
    names = [one["name"] if one["state"] is None else f"{one['name']}/{one['state']}" for one in found]
    assert [f"  {name}: {one['detail']}" for name, one in zip(names, found, strict=True)] == plain
    assert {"global_steps", "embedding.weight"} <= {one["name"] for one in report["differences"]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_object_of_numbers_that_json_lacks(value: float, tmp_path: Path, ucp: Ucp) -> None:
    for name, element in (("a", 1.0), ("b", value)):
        parameter = NativeParameter("weight", torch.tensor([1.0, element]))
        write_native(tmp_path / name, NativeModel((parameter,)), NativeRun(stage=1))
    shown = ucp("diff", tmp_path / "a", tmp_path / "b", "--json").stdout
    [difference] = json.loads(shown, parse_constant=pytest.fail)["differences"]
    assert (difference["max_abs"], difference["first_index"], difference["count"]) == (str(value), [1], 1)


def test_a_spec_for_one_side(sharded: Path, spec_file: Path, tmp_path: Path, ucp: Ucp) -> None:
    assert ucp("convert", sharded, tmp_path / "u", "--spec", spec_file).exit_code == 0
    assert ucp("diff", sharded, tmp_path / "u").exit_code == 2
    assert ucp("diff", sharded, tmp_path / "u", "--spec-a", spec_file).exit_code == 0
    assert ucp("diff", tmp_path / "u", sharded, "--spec-b", spec_file).exit_code == 0
    assert ucp("diff", sharded, sharded, "--spec", spec_file).exit_code == 0
