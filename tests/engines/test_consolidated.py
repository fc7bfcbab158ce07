"""Folders that DeepSpeed's own ``ds_to_universal`` made, as sources of loads on other topologies, beside its own load of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import differences
from click.testing import CliRunner

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.megatron_deepspeed import universal_checkpoint_info
from ucp_deepspeed.testing.ranks import RankPool, get_pool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

STEP = 2
BUFFERS = {"calibration", "calls"}
"""Names that DeepSpeed's own universal load leaves as the model has them."""

BLOCK = {"enabled": True}


@dataclass(frozen=True)
class Case:
    """A run whose checkpoint is consolidated, and one of another topology that goes on from it.

    Attributes:
        ranks: numbers of ranks of both.
        stock: whether DeepSpeed's own universal load can read it there.
    """

    source: Run
    target: Run
    ranks: tuple[int, int] = (2, 1)
    stock: bool = True
    saved: dict[str, Any] = field(default_factory=dict)


def autotp(stage: int, tp: int) -> Run:
    return Run("huggingface", {"family": "llama"}, tp=tp, zero={"stage": stage}, universal=BLOCK)


def megatron(tp: int, stage: int) -> Run:
    return Run("megatron-deepspeed-llama", {"layers": 1}, tp=tp, zero={"stage": stage}, universal=None)


def experts(ep: int, stage: int) -> Run:
    config = {"expert_parallel": {"enabled": True, "autoep_size": ep}}
    return Run("huggingface", {"family": "mixtral"}, zero={"stage": stage}, universal=BLOCK, config=config)


MLP = Run("mlp", zero={"stage": 1}, precision="bf16", universal=BLOCK)
PIPELINE = Run("llama", pp=2, zero={"stage": 1}, precision="bf16", universal=BLOCK)
INFO = {"universal_checkpoint_info": universal_checkpoint_info(VOCABULARY, True, False)}

CASES = {
    "zero-1": Case(MLP, replace(MLP, zero={"stage": 2})),
    "zero-3": Case(replace(MLP, zero={"stage": 3}), replace(MLP, zero={"stage": 3})),
    "zero-3-to-1": Case(replace(MLP, zero={"stage": 3}), MLP, stock=False),
    "fp16": Case(replace(MLP, precision="fp16"), replace(MLP, precision="fp16")),
    "groups": Case(
        replace(MLP, groups="decay", zero={"stage": 2}), replace(MLP, groups="decay", zero={"stage": 3}), stock=False
    ),
    "groups-zero-3": Case(replace(MLP, groups="decay", zero={"stage": 3}), replace(MLP, groups="decay"), stock=False),
    "frozen": Case(replace(MLP, frozen=("norm.weight",)), replace(MLP, frozen=("norm.weight",)), stock=False),
    "frozen-zero-3": Case(
        replace(MLP, frozen=("norm.weight",), zero={"stage": 3}), replace(MLP, frozen=("norm.weight",)), stock=False
    ),
    "autotp": Case(autotp(1, 2), autotp(1, 1), (2, 2)),
    "autotp-zero-3": Case(autotp(3, 2), autotp(1, 1), (4, 1), stock=False),
    "megatron-deepspeed": Case(megatron(2, 1), megatron(1, 2), (2, 2), saved=INFO),
    "megatron-deepspeed-padded": Case(megatron(1, 1), megatron(2, 1), (2, 4), saved=INFO),
    "pipeline": Case(PIPELINE, replace(PIPELINE, pp=1)),
    "autoep": Case(experts(2, 1), experts(1, 1), (2, 2)),
    "autoep-zero-2": Case(experts(1, 2), experts(2, 2), (2, 4)),
}


def drop_extra_states(folder: Path) -> None:
    """Leave out the empty extra states of Transformer Engine's layers, which Megatron-DeepSpeed doesn't have: the tool fails on
    them."""
    for path in folder.glob("*_model_states.pt"):
        saved = torch.load(path, weights_only=False)
        saved["module"] = {key: value for key, value in saved["module"].items() if value is not None}
        torch.save(saved, path)


def consolidated(source: Path, destination: Path) -> None:
    """Run DeepSpeed's own tool."""
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--no_strict"]
    folders = ["--input_folder", str(source), "--output_folder", str(destination)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*tool, *folders], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_checkpoint_that_it_was_made_from(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Parameters, states, groups and the run, and then those of an engine of another topology. DeepSpeed's own load agrees."""
    case = CASES[name]
    first, second = case.ranks
    ranks(first).run(
        train, case.source, STEP, save=str(tmp_path / "a"), save_tag="a", client_state={"epoch": 3, **case.saved}
    )
    if case.saved:
        drop_extra_states(tmp_path / "a" / "a")
    consolidated(tmp_path / "a" / "a", tmp_path / "u" / "u")
    assert differences(tmp_path / "a" / "a", tmp_path / "u" / "u") == []
    target = replace(case.target, universal=BLOCK)
    outcome = ranks(second).run(
        train, target, STEP, load=str(tmp_path / "u"), tag="u", save=str(tmp_path / "b"), save_tag="b"
    )
    assert outcome[0].client_state["epoch"] == 3
    assert differences(tmp_path / "a" / "a", tmp_path / "b" / "b") == []
    if case.stock:
        own = replace(
            target,
            seed=5,
            config={**target.config, "checkpoint": {"load_universal": True}},
            universal=BLOCK | {"load": "never"},
        )
        ranks(second).run(train, own, 0, load=str(tmp_path / "u"), tag="u", save=str(tmp_path / "c"), save_tag="c")
        found = differences(tmp_path / "b" / "b", tmp_path / "c" / "c")
        assert {line.split()[0] for line in found} <= BUFFERS, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the tool's, and the checkpoint beside it that it was made from."""
    root = tmp_path_factory.mktemp("consolidated")
    get_pool(2).run(train, MLP, STEP, save=str(root), save_tag="a")
    consolidated(root / "a", root / "u")
    return root


def spoil(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved = torch.load(path, weights_only=False)
    torch.save(change(saved), path)


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no master": (lambda zero: (zero / "norm.bias" / "fp32.pt").unlink(), r"zero/norm.bias lacks fp32.pt"),
    "no atom": (lambda zero: shutil.rmtree(zero / "gain"), r"zero/gain is no folder with the files of gain"),
    "no optimizer": (lambda zero: (zero / "optimizer_state.pt").unlink(), r"optimizer_state.pt is missing"),
    "truncated": (lambda zero: os.truncate(zero / "gain" / "fp32.pt", 300), r"gain/fp32.pt"),
    "other shape": (
        lambda zero: spoil(zero / "norm.bias" / "fp32.pt", lambda saved: saved | {"param": torch.ones(7)}),
        r"fp32.pt has shape \(7,\); the model_states files say \(20,\): files of two runs",
    ),
    "other states": (
        lambda zero: spoil(zero / "norm.bias" / "exp_avg.pt", lambda saved: saved | {"param": torch.ones(7)}),
        r"'exp_avg' isn't element-wise",
    ),
    "an object": (
        lambda zero: spoil(zero / "gain" / "fp32.pt", lambda saved: {"param": Path("x")}),
        r"holds a PosixPath where a tensor",
    ),
    "no tensor": (lambda zero: spoil(zero / "gain" / "fp32.pt", lambda saved: {}), r"lacks the key 'param'"),
    "a name outside": (
        lambda zero: spoil(
            zero.parent / "mp_rank_00_model_states.pt",
            lambda saved: saved | {"param_shapes": [{"../../a": (1,)}]},
        ),
        r"is no folder with the files of ../../a",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_damaged_ones_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "u", tmp_path / "u")
    spoiling, message = SPOILS[name]
    spoiling(tmp_path / "u" / "zero")
    with pytest.raises(UniversalCheckpointError, match=message):
        convert(UniversalView.of(open_checkpoint(tmp_path / "u")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands_take_it(folder: Path, tmp_path: Path) -> None:
    """``ucp verify`` finds a flipped bit by the archive's own sum."""
    shutil.copytree(folder / "u", tmp_path / "u")
    atom = tmp_path / "u" / "zero" / "linear_in.weight" / "exp_avg.pt"
    whole = bytearray(atom.read_bytes())
    whole[len(whole) // 2] ^= 1
    atom.write_bytes(whole)
    run = CliRunner().invoke
    assert "deepspeed universal" in run(main, ["inspect", str(folder / "u")]).output
    sound, spoiled = (run(main, ["verify", str(path / "u")]) for path in (folder, tmp_path))
    assert (sound.exit_code, spoiled.exit_code) == (0, 1)
    assert "no part of the checkpoint" not in sound.output and "linear_in.weight/exp_avg.pt" in spoiled.output
