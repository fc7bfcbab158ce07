"""Megatron's models exported to Hugging Face's: the oracle is the logits, since a part in the wrong place keeps every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import STEP
from test_megatron_families import ALWAYS, ROUNDING, logits_of

import ucp_deepspeed
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import SEQUENCE, VOCABULARY, Run, batch_of, train

Ranks = Callable[[int], RankPool]

CONFIGS = Path(__file__).parents[2] / "configs"

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

GPT2: dict[str, Any] = {"n_embd": 48, "num_hidden_layers": 2, "n_head": 8, "n_inner": 40, "n_positions": SEQUENCE}
GPT2 |= {"activation_function": "gelu", "tie_word_embeddings": True}

MODELS = {
    "llama": (Run("llama", {"layers": 1, "vocabulary_multiple": 5}, tp=2, zero={"stage": 2}), "LlamaConfig", {}),
    "tied": (Run("llama", {"layers": 1, "tied": True}, tp=2), "LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": (Run("llama", {"layers": 1, "qkv_bias": True}, zero={"stage": 3}), "Qwen2Config", {}),
    "qwen3": (Run("llama", {"layers": 1, "qk_norm": True}, tp=2), "Qwen3Config", {"head_dim": 6}),
    "mixtral": (
        Run("llama", {"layers": 1, "experts": 3}, tp=2),
        "MixtralConfig",
        {"num_local_experts": 3, "num_experts_per_tok": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "gpt2": (Run("gpt", {"layers": 2, "query_groups": 8}, tp=2), "GPT2Config", GPT2),
    "neox": (
        Run("gpt", {"layers": 1, "query_groups": 8, "tied": False, "rotary": True}, tp=2, zero={"stage": 2}),
        "GPTNeoXConfig",
        {"use_parallel_residual": False, "rotary_pct": 1.0},
    ),
    "megatron-deepspeed-gpt": (
        Run("megatron-deepspeed-gpt", {"layers": 1, "query_groups": 8}),
        "GPT2Config",
        GPT2 | {"num_hidden_layers": 1},
    ),
    "megatron-deepspeed": (Run("megatron-deepspeed-llama", {"layers": 1}, tp=2), "LlamaConfig", {}),
}


def configured(folder: Path, kind: str, **changes: Any) -> Path:
    getattr(transformers, kind)(**SIZE | changes).save_pretrained(folder)
    return folder


def check_logits(folder: Path, expected: torch.Tensor, run: Run) -> None:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert model.dtype == torch.float32 and model.config.vocab_size == VOCABULARY
    with torch.no_grad():
        logits = model.eval()(batch_of(run, 0)[:, :-1]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("title", MODELS)
def test_transformers_computes_the_same(title: str, ranks: Ranks, tmp_path: Path) -> None:
    run, kind, changes = MODELS[title]
    spec = run.model.replace("-", "_") if title.startswith("megatron-deepspeed") else "auto"
    expected = ranks(2).run(logits_of, run, load=None, save=str(tmp_path / "run"), steps=STEP)[0]
    config = configured(tmp_path / "config", kind, **changes)
    with ucp_deepspeed.open_checkpoint(tmp_path / "run", spec=spec) as checkpoint:
        checkpoint.export(tmp_path / "hf", config_from=config)
    check_logits(tmp_path / "hf", expected, run)


def test_a_pipeline(ranks: Ranks, tmp_path: Path) -> None:
    """Another engine loads the pipeline's checkpoint as a plain model, and says what it computes."""
    run = Run("llama", {"layers": 2}, tp=1, pp=2, zero={"stage": 1})
    ranks(2).run(train, run, STEP, save=str(tmp_path / "run"))
    plain = replace(run, pp=None, universal=ALWAYS)
    load, save = str(tmp_path / "run"), str(tmp_path / "plain")
    expected = ranks(2).run(logits_of, plain, load=load, save=save, steps=STEP)[0]
    config = configured(tmp_path / "config", "LlamaConfig", num_hidden_layers=2)
    with ucp_deepspeed.open_checkpoint(tmp_path / "run") as checkpoint:
        checkpoint.export(tmp_path / "hf", config_from=config)
    check_logits(tmp_path / "hf", expected, run)


def test_what_cannot_be_mapped_is_named(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(train, Run("llama", {"layers": 1}), 1, save=str(tmp_path / "llama"))
    out = tmp_path / "hf"

    def export(source: str, config: str | None = "LlamaConfig", spec: str = "auto", **changes: Any) -> None:
        place = None if config is None else configured(tmp_path / f"config-{config}-{len(changes)}", config, **changes)
        with ucp_deepspeed.open_checkpoint(tmp_path / source, spec=spec) as checkpoint:
            checkpoint.export(out, config_from=place)

    with pytest.raises(MismatchError, match="the configuration of the Hugging Face model tells its names and heads"):
        export("llama", None)
    with pytest.raises(
        MismatchError, match=r"of type llama, mistral, qwen2, qwen3; config\.json is of type 'gpt_neox'"
    ):
        export("llama", "GPTNeoXConfig")
    with pytest.raises(UnsupportedError, match=r"(?s)can't be cut into 7 groups of 1:1:1.*correct 'huggingface'"):
        export("llama", num_attention_heads=7, num_key_value_heads=7, hidden_size=49)
    with pytest.raises(MismatchError, match=r"tie_word_embeddings: true, and .* has an output layer of its own"):
        export("llama", tie_word_embeddings=True)
    silent = tmp_path / "silent.yaml"
    silent.write_text((CONFIGS / "megatron_core_llama.yaml").read_text().split("huggingface:")[0])
    with pytest.raises(UnsupportedError, match=r"(?s)names of Megatron's \(megatron_core_llama\).*Hugging Face names"):
        export("llama", spec=str(silent))
    assert not out.exists()


def test_bloom_has_the_same_tensors(ranks: Ranks, tmp_path: Path) -> None:
    """The tests' model lacks ALiBi, so that its logits say nothing: the values are compared by what the checkpoint has."""
    from transformers import AutoModelForCausalLM, BloomConfig

    run = Run("megatron-deepspeed-bloom", {"layers": 1, "ffn": 192}, tp=2)
    ranks(2).run(train, run, 1, save=str(tmp_path / "run"))
    BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=1, n_head=8).save_pretrained(tmp_path / "config")
    with ucp_deepspeed.open_checkpoint(tmp_path / "run") as checkpoint:
        checkpoint.export(tmp_path / "hf", config_from=tmp_path / "config")
        held = {name.split(".", 1)[1]: checkpoint.read(name) for name in checkpoint.parameters}
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(told.values()), told
    found = {name: tensor for name, tensor in model.named_parameters()}
    for ours, theirs in (
        ("embedding.word_embeddings.weight", "word_embeddings.weight"),
        ("embedding.word_embeddings.norm.bias", "word_embeddings_layernorm.bias"),
        ("encoder.layers.0.self_attention.query_key_value.weight", "h.0.self_attention.query_key_value.weight"),
        ("encoder.layers.0.mlp.dense_4h_to_h.weight", "h.0.mlp.dense_4h_to_h.weight"),
        ("encoder.final_layernorm.bias", "ln_f.bias"),
    ):
        assert torch.equal(found[f"transformer.{theirs}"], held[ours]), theirs
    assert len(found) == len(held)
