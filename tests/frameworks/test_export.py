"""Exports of real engines' checkpoints, loaded by the libraries that they are for."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM

import ucp_deepspeed
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.testing.huggingface_models import causal_logits
from ucp_deepspeed.testing.ranks import RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import VOCABULARY, Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

TOKENS = torch.arange(24).reshape(2, 12) * 5 % VOCABULARY


def trained(run: Run, folder: str) -> torch.Tensor:
    """On a rank: train and save, and the logits for `TOKENS`. The configuration lies beside the tags, as frameworks leave it;
    beside it what DeepSpeed saves of the weights that it computes with."""
    with fp16_on_cpu():
        engine = build_engine(run)
        for step in (1, 2):
            train_step(engine, run, step)
        engine.save_checkpoint(folder)
        engine.eval()
        with torch.no_grad():
            logits = causal_logits(engine, TOKENS)
        engine.module.config.save_pretrained(folder)
        if not run.config and run.tp == 1:
            engine.save_16bit_model(folder, "sixteen.bin")
        engine.destroy()
    return logits


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(source / "sixteen.bin", weights_only=True)
    return found


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]
    assert different == []


STAGE_3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}

RUNS = {
    "llama at 0": Run("huggingface", {"family": "llama"}, zero={"stage": 0}, precision="bf16"),
    "tied at 1": Run("huggingface", {"family": "qwen2_tied"}, zero={"stage": 1}, precision="bf16"),
    "gpt2 at 2": Run("huggingface", {"family": "gpt2"}, zero={"stage": 2}, precision="bf16"),
    "frozen at 2": Run(
        "huggingface",
        {"family": "qwen3"},
        zero={"stage": 2},
        precision="fp16",
        frozen=("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"),
    ),
    "neox at 3": Run("huggingface", {"family": "gpt_neox"}, zero=STAGE_3, precision="bf16"),
    "tied and frozen at 3": Run(
        "huggingface", {"family": "qwen2_tied"}, zero=STAGE_3, frozen=("model.norm.weight",), precision="fp32"
    ),
    "experts at 1": Run("huggingface", {"family": "mixtral"}, zero={"stage": 1}, precision="bf16"),
    "buffers and experts at 2": Run("huggingface", {"family": "deepseek_v3"}, zero={"stage": 2}, precision="bf16"),
}

AUTOEP = {"expert_parallel": {"enabled": True, "autoep_size": 2}}

CUT = {
    "llama on two": Run("huggingface", {"family": "llama"}, tp=2, zero={"stage": 1}, precision="bf16"),
    "tied on two": Run("huggingface", {"family": "qwen2_tied"}, tp=2, zero={"stage": 2}, precision="fp32"),
    "Mixtral's experts": Run("huggingface", {"family": "mixtral"}, zero={"stage": 1}, config=AUTOEP),
    "Qwen's experts": Run("huggingface", {"family": "qwen2_moe"}, zero={"stage": 2}, config=AUTOEP),
}


@pytest.mark.parametrize("title", CUT)
def test_models_that_deepspeed_cuts(title: str, ranks: Ranks, tmp_path: Path) -> None:
    """Sums over ranks run in another order: the logits are near. No other loader of these files gives the whole weights."""
    source, run = tmp_path / "run", CUT[title]
    logits = ranks(2).run(trained, run, str(source))[0]
    with ucp_deepspeed.open_checkpoint(source) as checkpoint:
        checkpoint.export(tmp_path / "hf")
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    model.to(model.dtype).eval()
    bound = 1e-5 if run.precision == "fp32" else 0.04
    assert (causal_logits(model, TOKENS) - logits).abs().max() < bound


@pytest.mark.parametrize("title", RUNS)
def test_transformers_loads_what_was_trained(title: str, ranks: Ranks, tmp_path: Path) -> None:
    source = tmp_path / "run"
    logits = ranks(2).run(trained, RUNS[title], str(source))[0]
    weights = weights_of(source)
    with ucp_deepspeed.open_checkpoint(source) as checkpoint:
        checkpoint.export(tmp_path / "hf", max_shard_size="10KB")
        held = dict(checkpoint.state_dict())
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    check_equal(state_of(model), weights)
    model.to(model.dtype).eval()  # DeepSpeed rounds the frequencies of rotary positions too, which no file holds
    assert torch.equal(causal_logits(model, TOKENS), logits)
    check_equal(held, weights)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards and len(shards) > 1


@pytest.mark.parametrize("title", ["tied at 1", "frozen at 2", "tied and frozen at 3"])
def test_torch_loads_what_zero_to_fp32_makes(title: str, ranks: Ranks, tmp_path: Path) -> None:
    source = tmp_path / "run"
    ranks(2).run(trained, RUNS[title], str(source))
    expected = get_fp32_state_dict_from_zero_checkpoint(str(source))
    with ucp_deepspeed.open_checkpoint(source) as checkpoint:
        checkpoint.export(tmp_path / "torch", "torch", source="master")
        check_equal(dict(checkpoint.state_dict(torch.float32)), {name: held.float() for name, held in expected.items()})
    path = tmp_path / "torch" / "pytorch_model.bin"
    found = torch.load(path, weights_only=True)
    check_equal(found, dict(expected))
    check_equal(torch.load(path, weights_only=True, mmap=True), found)
    shared = [name for name in found if found[name].data_ptr() == found["model.embed_tokens.weight"].data_ptr()]
    assert len(shared) == (2 if "tied" in title else 1)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_peft_loads_the_adapter(ranks: Ranks, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from trainer_runs import Job, model_of, train

    job = Job(tmp_path / "job", zero=2, arguments={"max_steps": 2, "save_steps": 2}, peft={})
    ranks(2).run(train, job)
    saved = tmp_path / "job" / "checkpoint-2"
    done = CliRunner().invoke(main, ["export", str(saved), str(tmp_path / "adapter"), "--adapter"])
    assert done.exit_code == 0 and "left out: optimizer states (exp_avg, exp_avg_sq, step)" in done.stderr, done.stderr
    check_equal(
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"), load_file(saved / "adapter_model.safetensors")
    )
    loaded = [
        PeftModel.from_pretrained(model_of(replace(job, peft=None)), folder).eval()
        for folder in (saved, tmp_path / "adapter")
    ]
    check_equal(state_of(loaded[1]), state_of(loaded[0]))
    assert any(name.endswith("lora_B.default.weight") and held.any() for name, held in state_of(loaded[1]).items())
    with pytest.raises(UnsupportedError, match=r"(?s)adapters of PEFT.*--adapter exports them"):
        ucp_deepspeed.open_checkpoint(saved).export(tmp_path / "hf")
