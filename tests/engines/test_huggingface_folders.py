"""Runs that begin with the weights of a folder that transformers' ``save_pretrained`` wrote, on several topologies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import MismatchError, UniversalCheckpointError
from ucp_deepspeed.testing.huggingface_models import build_huggingface
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, train

Ranks = Callable[[int], RankPool]

ANEW = {"enabled": True, "optimizer_states": "reset", "scheduler": "keep"}


def save_model(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, torch.Tensor]:
    """Save a model as transformers does; return the tensors that safetensors' own reader finds."""
    build_huggingface(family, VOCABULARY, dtype, seed=11).save_pretrained(folder, **options)
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def run_of(family: str, tp: int = 1, stage: int = 1, **changes: Any) -> Run:
    return replace(Run("huggingface", {"family": family}, tp=tp, zero={"stage": stage}, universal=ANEW), **changes)


CASES: dict[str, tuple[Run, int, dict[str, Any]]] = {
    "ZeRO-1": (run_of("llama"), 2, {}),
    "ZeRO-3, several files": (run_of("llama", stage=3), 2, {"max_shard_size": "20KB"}),
    "AutoTP": (run_of("llama", tp=2), 2, {"max_shard_size": "20KB"}),
    "tied": (run_of("qwen2_tied", stage=2), 1, {}),
    "bf16": (run_of("gpt_neox", stage=2, precision="bf16"), 2, {"dtype": torch.bfloat16}),
    "transposed": (run_of("gpt2", stage=3), 2, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_begins_with_the_weights(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Masters are the weights, bit for bit; the optimizer has taken no step."""
    run, size, options = CASES[name]
    saved = save_model(str(run.size["family"]), tmp_path / "hf", **options)
    ranks(size).run(train, run, 0, load=str(tmp_path / "hf"), save=str(tmp_path / "b"), save_tag="b")
    with ucp_deepspeed.open_checkpoint(tmp_path / "b") as held:
        trained = [each for each in held.parameters.values() if each.kind == "trainable"]
        assert {each.name for each in trained} == saved.keys()
        for each in trained:
            assert torch.equal(held.read(each.name, "fp32"), saved[each.name].float()), each.name
            assert not each.scalars.get("step")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_have_other_names_in_files(family: str, ranks: Ranks, tmp_path: Path) -> None:
    """A file has a tensor for each matrix of an expert, and the model fuses them. transformers' own load says what they are."""
    saved = save_model(family, tmp_path / "hf")
    run = run_of(family, stage=2)
    ranks(2).run(train, run, 0, load=str(tmp_path / "hf"), save=str(tmp_path / "b"), save_tag="b")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
    with ucp_deepspeed.open_checkpoint(tmp_path / "b") as held:
        trained = [each.name for each in held.parameters.values() if each.kind == "trainable"]
        assert any("gate_up_proj" in name for name in trained) and not any("gate_up_proj" in name for name in saved)
        for name in trained:
            assert torch.equal(held.read(name, "fp32"), expected[name]), name


def test_a_resume_asks_what_becomes_of_the_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    """Its weights alone load with DeepSpeed's own arguments too."""
    save_model("llama", tmp_path / "hf")
    run = run_of("llama", universal={"enabled": True})
    with pytest.raises(RankError, match=r"with weights alone: load_module_only=True") as caught:
        ranks(1).run(train, run, 0, load=str(tmp_path), tag="hf")
    assert isinstance(caught.value.original, MismatchError)
    ranks(1).run(train, run, 1, load=str(tmp_path / "hf"), options={"load_module_only": True})


def test_a_first_start_in_a_folder_with_weights(ranks: Ranks, tmp_path: Path) -> None:
    """As with DeepSpeed alone: a script that always loads begins anew, and a later start finds what it saved."""
    save_model("llama", tmp_path)
    run = run_of("llama", universal={"enabled": True})
    assert ranks(2).run(train, run, 1, load=str(tmp_path), save=str(tmp_path), save_tag="a")[0].load_path is None
    assert ranks(1).run(train, run, 2, load=str(tmp_path))[0].load_path is not None


def test_commands_take_it(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "hf", max_shard_size="20KB")
    run = CliRunner().invoke
    told = run(main, ["inspect", str(tmp_path / "hf")])
    assert told.exit_code == 0 and "hugging face" in told.output and "Weights only" in told.output
    told = run(main, ["verify", str(tmp_path / "hf")])
    assert told.exit_code == 2 and "unproven" in told.output and "model-00001" in told.output
    assert (
        run(main, ["plan", str(tmp_path / "hf"), "--dp", "2", "--zero", "3", "--optimizer-states", "reset"]).exit_code
        == 0
    )
    told = run(main, ["convert", str(tmp_path / "hf"), str(tmp_path / "universal")])
    assert told.exit_code == 2 and told.output.rstrip().endswith("ucp export writes the weights alone")
    told = run(
        main, ["export", str(tmp_path / "hf"), str(tmp_path / "again"), "--to", "torch", "--max-shard-size", "1GB"]
    )
    assert told.exit_code == 2 and "only the form hf has several files" in told.output
    assert run(main, ["export", str(tmp_path / "hf"), str(tmp_path / "again")]).exit_code == 0
    again = {
        key: value for path in (tmp_path / "again").glob("*.safetensors") for key, value in load_file(path).items()
    }
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)


def test_an_index_that_an_earlier_save_left(folder: Path, tmp_path: Path) -> None:
    """``from_pretrained`` takes the single file where both are there."""
    shutil.copytree(folder, tmp_path / "hf")
    build_huggingface("llama", VOCABULARY, torch.float32, seed=12).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    with ucp_deepspeed.open_checkpoint(tmp_path / "hf") as checkpoint:
        assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.parameters)
    first(tmp_path / "hf").unlink()
    assert open_checkpoint(tmp_path / "hf").parameters


def spoil_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


SPOILS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is missing": (
        lambda folder: first(folder).unlink(),
        r"is missing, and model.safetensors.index.json names it",
    ),
    "a file is truncated": (lambda folder: os.truncate(first(folder), 4000), r"can't lie in bytes"),
    "no header": (lambda folder: first(folder).write_bytes(b"x" * 500), r"has no safetensors header"),
    "a tensor elsewhere": (
        lambda folder: save_file({"other": torch.ones(1)}, first(folder)),
        r"holds other, which model.safetensors.index.json doesn't put there",
    ),
    "a file outside": (
        lambda folder: spoil_index(folder, lambda files: files.update(dict.fromkeys(files, "../x.safetensors"))),
        r"names a file outside of its folder",
    ),
    "a file without a name": (
        lambda folder: spoil_index(folder, lambda files: files.update(dict.fromkeys(files, "x\0.safetensors"))),
        r"names a file outside of its folder",
    ),
    "a tensor that isn't there": (
        lambda folder: spoil_index(folder, lambda files: files.update({"more": first(folder).name})),
        r"lacks more",
    ),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), r"is no index"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("huggingface")
    save_model("llama", path, max_shard_size="20KB")
    return path


@pytest.mark.parametrize("name", SPOILS)
def test_damaged_ones_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "hf")
    spoiling, message = SPOILS[name]
    spoiling(tmp_path / "hf")
    with pytest.raises(UniversalCheckpointError, match=message):
        open_checkpoint(tmp_path / "hf")


def test_a_checkpoint_of_trainers_isnt_one(folder: Path, tmp_path: Path) -> None:
    """It has such files beside the tag that ``latest`` names."""
    shutil.copytree(folder, tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "latest").write_text("global_step5")
    with pytest.raises(UniversalCheckpointError, match="no tag 'global_step5'"):
        open_checkpoint(tmp_path / "checkpoint-5")
