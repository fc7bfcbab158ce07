"""Checkpoints that older versions of DeepSpeed wrote: what is read of them is what their engines held, bit for bit.

``tests/golden/VERSION/FORM`` holds a checkpoint of two ranks, two parameter groups and three steps, and ``truth.pt``: full
masters, moments, frozen weights, buffers, rates and step counts, gathered from the live engine that wrote it.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from native_models import whole
from torch.torch_version import TorchVersion

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import WEIGHT
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.cli.inspect import inspect_checkpoint
from ucp_deepspeed.errors import MismatchError, UnsupportedError

GOLDEN = Path(__file__).parents[3] / "golden"
GOLDEN_UNIVERSAL = GOLDEN.with_name("golden_universal")
UNTOLD = "0.17.6/z0bf16_frozen-Adam"
"""DeepSpeed wrote no optimizer state into it."""
UNRECORDED = "0.5.10/z3fp16_frozen-Adam"
"""DeepSpeed wrote no frozen weights into it."""
WHOLE = sorted(
    f"{folder.parent.name}/{folder.name}" for folder in GOLDEN.glob("*/*") if not folder.match(f"*/{UNTOLD}")
)
STATES = {"buffer": WEIGHT, "weight": WEIGHT, "fp32": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of states in `truth.pt` → their names in a catalog."""


@cache
def truth(name: str) -> dict[str, Any]:
    """Return what the engine held."""
    with torch.serialization.safe_globals([TorchVersion]):
        found: dict[str, Any] = torch.load(GOLDEN / name / "truth.pt", weights_only=True)
    return found


def check_holds_the_truth(checkpoint: Checkpoint, name: str) -> None:
    """Every state of every parameter, and nothing else."""
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in truth(name)["tensors"].items():
        parameter, state = key.rsplit("|", 1)
        if state in STATES and not (name == UNRECORDED and parameter.startswith("frozen.")):
            expected.setdefault(parameter, {})[STATES[state]] = tensor
    view = UniversalView.of(checkpoint)
    assert view.parameters.keys() == expected.keys()
    for parameter, states in expected.items():
        assert view.parameters[parameter].states.keys() == states.keys(), parameter
        for state, tensor in states.items():
            assert torch.equal(whole(view, parameter, state), tensor), (parameter, state)
    run = checkpoint.run
    assert (run.global_steps, run.ds_version) == (truth(name)["global_steps"], truth(name)["ds"])
    assert (run.precision, run.loss_scale is not None) == ("fp16" if "fp16" in name else "bf16", "fp16" in name)
    rates = [(group.hyperparameters["lr"], group.hyperparameters["weight_decay"]) for group in view.groups]
    assert rates == list(zip(truth(name)["lr"], truth(name)["wd"], strict=True))
    steps = {held.scalars["step"] for held in view.parameters.values() if held.kind == "trainable"}
    assert steps == (set(truth(name)["steps"].values()) or {4.0})  # without ZeRO it isn't told, and there is one more


@pytest.mark.parametrize("name", WHOLE)
def test_what_the_engine_held_is_read_and_converted(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    check_holds_the_truth(checkpoint, name)
    drop = ["--on-unreadable", "drop"] if name == UNRECORDED else []
    found = CliRunner().invoke(main, ["convert", str(GOLDEN / name), str(tmp_path / "u"), *drop])
    assert found.exit_code == 0, found.output
    check_holds_the_truth(open_checkpoint(tmp_path / "u"), name)
    assert CliRunner().invoke(main, ["diff", str(GOLDEN / name), str(tmp_path / "u")]).exit_code == 0


def test_frozen_weights_that_were_never_written_are_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN / UNRECORDED)
    assert checkpoint.unrecorded.keys() == {"frozen.weight", "frozen.bias"}
    assert inspect_checkpoint(checkpoint, None, None)["unrecorded"].keys() == checkpoint.unrecorded.keys()
    source, destination = str(GOLDEN / UNRECORDED), str(tmp_path / "u")
    plan = ["plan", source, "--dp", "1", "--zero", "1"]
    planned = CliRunner().invoke(main, plan)
    assert planned.exit_code == 1 and "frozen.weight: DeepSpeed 0.5.10 left its value out" in planned.output
    assert CliRunner().invoke(main, [*plan, "--on-missing", "init"]).exit_code == 0
    found = CliRunner().invoke(main, ["convert", source, destination])
    assert isinstance(found.exception, UnsupportedError | SystemExit) and found.exit_code
    assert "frozen.weight: DeepSpeed 0.5.10 left its value out" in found.output
    assert "--on-unreadable drop" in found.output and not (tmp_path / "u").exists()
    found = CliRunner().invoke(main, ["convert", source, destination, "--on-unreadable", "drop"])
    assert "left out frozen.weight, " in found.output.replace(":", ",")


def test_an_optimizer_state_that_was_never_written_is_no_damage(tmp_path: Path) -> None:
    """Weights are read; whoever asks for more is told that, and how to go on."""
    checkpoint = open_checkpoint(GOLDEN / UNTOLD)
    view = UniversalView.of(checkpoint)
    for key, tensor in truth(UNTOLD)["tensors"].items():
        parameter, state = key.rsplit("|", 1)
        if state in ("lp", "weight", "buffer"):
            held = "fp32" if view.parameters[parameter].kind == "trainable" else WEIGHT
            assert torch.equal(whole(view, parameter, held), tensor), parameter
    assert isinstance(checkpoint.lacking, MismatchError)
    assert "DeepSpeed 0.17.6, which wrote it, left it out at bf16 and ZeRO stage 0" in str(checkpoint.lacking)
    found = CliRunner().invoke(main, ["convert", str(GOLDEN / UNTOLD), str(tmp_path / "u")])
    assert found.exit_code and "load_module_only=True" in found.output
    assert "Weights only" in CliRunner().invoke(main, ["inspect", str(GOLDEN / UNTOLD)]).output


@pytest.mark.parametrize(
    ("version", "accumulated", "told"),
    [
        ("0.17.6", "fp32", "left it out at bf16 and ZeRO stage 1, with gradients accumulated in fp32"),
        ("0.17.6", "bf16", "aren't there"),
        ("0.14.5 ", "fp32", "aren't there"),
    ],
)
def test_who_left_out_the_optimizers_state_of_bf16(version: str, accumulated: str, told: str, tmp_path: Path) -> None:
    """DeepSpeed itself, or whoever removed the files. 0.17.6 writes the same at stage 1 but for the config."""
    shutil.copytree(GOLDEN / UNTOLD, tmp_path / "c")
    path = tmp_path / "c" / "t" / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    saved["ds_config"] |= {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": accumulated}}
    torch.save(saved | {"ds_version": version}, path)
    assert told in str(open_checkpoint(tmp_path / "c").lacking)


@pytest.mark.parametrize("name", ["0.5.10/z1fp16-Adam", "0.5.10/z2fp16-Adam", "0.7.7/z2fp16-Adam"])
def test_lost_files_of_the_optimizer_are_told(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "c")
    for path in (tmp_path / "c" / "t").glob("*optim_states.pt"):
        path.unlink()
    found = CliRunner().invoke(main, ["convert", str(tmp_path / "c"), str(tmp_path / "u")])
    assert found.exit_code and "(*_optim_states.pt) aren't there" in found.output
    assert not (tmp_path / "u").exists()


def test_what_an_older_tool_made_is_what_it_was_made_from() -> None:
    """The folder that ``ds_to_universal`` of 0.14.5 made of that version's files."""
    source, made = GOLDEN / "0.14.5/z1bf16_ga32_frozen-Adam", GOLDEN_UNIVERSAL / "ds_to_universal-0.14.5"
    assert open_checkpoint(made).form == "deepspeed universal"
    found = CliRunner().invoke(main, ["diff", str(source), str(made)])
    assert found.exit_code == 0, found.output
