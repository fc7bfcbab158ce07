"""Exports from each form of checkpoint: the files are those of the run's own checkpoint, or what the form's library reads."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

import fsdp_runs
import torch
from test_consolidated import consolidated

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]


def test_universal_folders_give_the_same_files(ranks: Ranks, tmp_path: Path) -> None:
    """Ours and DeepSpeed's: frozen weights and buffers are in them too."""
    run = Run("mlp", zero={"stage": 1}, precision="bf16", frozen=("linear_in.bias",))
    ranks(2).run(train, run, 2, save=str(tmp_path / "run"), save_tag="t")
    convert(UniversalView.of(open_checkpoint(tmp_path / "run")), tmp_path / "ours")
    consolidated(tmp_path / "run" / "t", tmp_path / "theirs" / "u")
    for source, tag in (("run", "t"), ("ours", None), ("theirs", "u")):
        with ucp_deepspeed.open_checkpoint(tmp_path / source, tag) as checkpoint:
            checkpoint.export(tmp_path / f"{source}-hf", max_shard_size="4KB")
            checkpoint.export(tmp_path / f"{source}-torch", "torch")
    names = {path.name for path in (tmp_path / "run-hf").iterdir()}
    assert len(names) > 2 and "model.safetensors.index.json" in names
    expected = torch.load(tmp_path / "run-torch" / "pytorch_model.bin", weights_only=True)
    for source in ("ours", "theirs"):
        weights = torch.load(tmp_path / f"{source}-torch" / "pytorch_model.bin", weights_only=True)
        assert weights.keys() == expected.keys()
        assert all(
            torch.equal(weights[name], held) and weights[name].dtype == held.dtype for name, held in expected.items()
        )
    assert filecmp.cmpfiles(tmp_path / "run-hf", tmp_path / "ours-hf", names, shallow=False)[1:] == ([], [])


def test_a_run_of_fsdp2(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(fsdp_runs.save, str(tmp_path / "run"), "nested", "fsdp", "AdamW")
    read = fsdp_runs.read_by_torch(tmp_path / "run")
    with ucp_deepspeed.open_checkpoint(tmp_path / "run") as checkpoint:
        checkpoint.export(tmp_path / "torch", "torch")
    found = torch.load(tmp_path / "torch" / "pytorch_model.bin", weights_only=True)
    assert found.keys() == {name for name in build_mlp(vocabulary=VOCABULARY).state_dict()}
    assert all(torch.equal(held, read[f"model.{name}"].view_as(held)) for name, held in found.items())
