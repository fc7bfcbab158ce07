"""Numbers that aren't the same on all partitions: each reader tells, and none takes the first one's for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from native_files import NativeRun, add_manifest, write_native
from native_models import model_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed import files as deepspeed_files
from ucp_deepspeed.checkpoint.differing import made_one
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.targeting import plan_target

MODEL = model_of({"first": (5, 3), "second": (7,), "third": (2, 2)})
GROUPS = (("first", "third"), ("second",))
LAST = "zero_pp_rank_2_mp_rank_00_optim_states.pt"
RUNS: dict[str, tuple[NativeRun, str, str]] = {
    "zero-1": (NativeRun(dp=3, stage=1, groups=GROUPS), LAST, "base_optimizer_state"),
    "zero-2": (NativeRun(dp=3, stage=2, groups=GROUPS), LAST, "base_optimizer_state"),
    "zero-3": (NativeRun(dp=3, stage=3, groups=GROUPS), LAST, "optimizer_state_dict"),
    "bf16": (
        NativeRun(dp=3, stage=1, groups=GROUPS, precision="bf16", optimizer="bf16"),
        f"bf16_{LAST}",
        "base_optimizer_state",
    ),
}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


def add_numbers(folder: Path, optimizer: str) -> None:
    """To each partition's first slot and last group one; those of all but the last partition are 0.5."""
    for path in folder.glob("*_optim_states.pt"):
        number = 2.5 if "rank_2_" in path.name else 0.5

        def change(saved: dict[str, Any], number: float = number) -> None:
            base = saved["optimizer_state_dict"][optimizer]
            base["state"][0]["rms"] = torch.tensor(number)
            base["param_groups"][1]["d"] = number

        edit(path, change)


def ucp(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output


@pytest.mark.parametrize("form", RUNS)
def test_every_reader_tells(form: str, tmp_path: Path) -> None:
    run, _, optimizer = RUNS[form]
    folder = write_native(tmp_path / "a", MODEL, run)
    add_numbers(folder, optimizer)
    checkpoint = open_checkpoint(folder)
    values = {"partition 0": 0.5, "partition 1": 0.5, "partition 2": 2.5}
    assert checkpoint.parameters["first"].differing == {"rms": values}
    assert checkpoint.parameters["second"].differing == {}
    assert [dict(group.differing) for group in checkpoint.groups] == [{}, {"d": values}]
    with pytest.raises(MismatchError, match=r"--on-differing first, last, mean or max") as refused:
        convert(UniversalView.of(checkpoint), tmp_path / "u")
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["first", "parameter group 1"]
    assert "'rms' is 0.5 on partition 0, 0.5 on partition 1, 2.5 on partition 2" in refused.value.problems[0]
    for how, number in (("first", 0.5), ("max", 2.5), ("mean", 3.5 / 3)):
        assert ucp("convert", tmp_path / "a", tmp_path / how, "--on-differing", how)[0] == 0
        made = open_checkpoint(tmp_path / how)
        assert made.parameters["first"].scalars["rms"] == made.groups[1].hyperparameters["d"] == number
    code, text = ucp("inspect", tmp_path / "a")
    assert code == 0 and "differs over partitions: first" in text and "group 1" in text


@pytest.mark.parametrize("form", ["zero-1", "zero-3"])
def test_diff_and_plan(form: str, tmp_path: Path) -> None:
    """A number that one partition alone has otherwise is a difference, on each partition."""
    run, last, optimizer = RUNS[form]
    folders = [write_native(tmp_path / name, MODEL, run) for name in "ab"]
    for folder in folders:
        add_numbers(folder, optimizer)

    def change(saved: dict[str, Any]) -> None:
        saved["optimizer_state_dict"][optimizer]["state"][0]["rms"] = torch.tensor(99.0)

    views = [UniversalView.of(open_checkpoint(folder)) for folder in folders]
    assert compare(*views) == []
    edit(folders[1] / last, change)
    views = [UniversalView.of(open_checkpoint(folder)) for folder in folders]
    told = {str(found) for found in compare(*views)}
    assert any("99.0" in line and "2.5" in line for line in told) and {found.what for found in compare(*views)} == {
        "scalar"
    }
    same = Topology(1, 1, 3, run.stage)
    assert plan_target(open_checkpoint(folders[0]), same).possible
    other = plan_target(open_checkpoint(folders[0]), Topology(1, 1, 2, run.stage))
    assert {each.name for each in other.obstacles} >= {"first", "the parameter group of second"}
    assert plan_target(
        open_checkpoint(folders[0]), Topology(1, 1, 2, run.stage), policies=Policies(differing="max")
    ).possible


@pytest.mark.parametrize("stage", [0, 1])
def test_tensor_parallel_ranks(stage: int, tmp_path: Path) -> None:
    folder = write_native(tmp_path, MODEL, NativeRun(tp=2, stage=stage, optimizer="plain" if stage == 0 else "zero"))
    kind = "model" if stage == 0 else "optim"
    [path] = folder.glob(f"*mp_rank_01_{kind}_states.pt")

    def change(saved: dict[str, Any]) -> None:
        base = saved["optimizer"] if stage == 0 else saved["optimizer_state_dict"]["base_optimizer_state"]
        base["param_groups"][0]["d"] = 7.0

    edit(path, change)
    held = open_checkpoint(folder).groups[0].differing
    assert held == {"d": {"tensor-parallel rank 0, partition 0": None, "tensor-parallel rank 1, partition 0": 7.0}}


def test_only_a_record_keeps_other_partitions_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = RUNS["zero-1"]
    folder = write_native(tmp_path, MODEL, run)
    assert len(opened(folder, monkeypatch)) == 4
    add_manifest(folder, MODEL, run, layouts=True)
    assert len(opened(folder, monkeypatch)) == 2


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    real = deepspeed_files.open_torch_file
    with monkeypatch.context() as patched:
        noted = lambda path, **options: names.append(path.name) or real(path, **options)  # noqa: E731
        patched.setattr(deepspeed_files, "open_torch_file", noted)
        checkpoint = open_checkpoint(folder)
        assert not any(held.differing for held in (*checkpoint.parameters.values(), *checkpoint.groups))
    assert len(names) == len(set(names)), "a file is opened once"
    return names


def test_made_one() -> None:
    held = {"a": 1, "b": 2, "c": 3}
    assert made_one({"k": 1, "x": 5}, {"k": held}, "mean")[0] == {"k": 2, "x": 5}
    assert made_one({"k": 1}, {"k": {"a": 1, "b": 2}}, "mean")[0] == {"k": 1.5}
    assert made_one({"k": (0.9,)}, {"k": {"a": (0.9,), "b": (0.8,)}}, "max")[1] == {"k": "(0.9,) on a, (0.8,) on b"}
    assert made_one({"k": (0.9,)}, {"k": {"a": (0.9,), "b": (0.8,)}}, "first") == ({"k": (0.9,)}, {})
