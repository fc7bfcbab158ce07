"""Tiny Hugging Face models, built from configurations: no weights are fetched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: class of its configuration.
        model: class of the model with the head that is trained.
        settings: settings of the tiny model's configuration, besides the size of its vocabulary.
        spec: name of its spec in ``configs/``; empty where there is none.
    """

    config: str
    model: str
    settings: Mapping[str, Any]
    spec: str


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _LLAMA, "hf_llama"),
    "mistral": Family("MistralConfig", "MistralForCausalLM", _LLAMA, "hf_llama"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _LLAMA, "hf_llama"),
    "qwen2_tied": Family("Qwen2Config", "Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True}, "hf_llama"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", _LLAMA | {"head_dim": 8}, "hf_llama"),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", _LLAMA | {"pad_token_id": 0, "num_key_value_heads": 8}, "hf_phi3"),
    "phi3_medium": Family(
        "Phi3Config", "Phi3ForCausalLM", _LLAMA | {"pad_token_id": 0, "num_attention_heads": 16}, "hf_phi3_medium"
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0},
        "hf_gpt_neox",
    ),
    "falcon": Family(
        "FalconConfig",
        "FalconForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 4}
        | {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "bias": True},
        "hf_falcon",
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        | {"max_position_embeddings": 32, "dropout": 0.0},
        "hf_opt",
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
        "hf_t5",
    ),
    "bert": Family(
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "hf_bert",
    ),
}


_LATENT = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

EXPERT_FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralConfig",
        "MixtralForCausalLM",
        _LLAMA | {"intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _LLAMA
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 4}
        | {"num_experts_per_tok": 2, "norm_topk_prob": True},
        "",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _LLAMA
        | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"head_dim": 8},
        "",
    ),
    "deepseek_v2": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", _LLAMA | _LATENT, ""),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", _LLAMA | _LATENT, ""),
}
"""Families with experts, which DeepSpeed's AutoEP deals out over ranks."""


OTHER_FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "",
    ),
}
"""Families that DeepSpeed cuts in no way."""


class _SingleExpert(torch.nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = torch.nn.Parameter(weight.detach().clone())
            setattr(self, name, linear)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.w2(torch.nn.functional.silu(self.w1(states)) * self.w3(states))
        return found


class SingleExperts(torch.nn.ModuleList):
    """Mixtral's experts as transformers 4 had them: each has modules of its own."""

    def __init__(self, fused: Any) -> None:
        super().__init__(_SingleExpert(*pair) for pair in zip(fused.gate_up_proj, fused.down_proj, strict=True))

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted output of the chosen experts for each token; see ``MixtralExperts.forward``."""
        total = torch.zeros_like(states)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            total.index_add_(0, token, expert(states[token]) * weights[token, place, None])
        return total


def build_huggingface(
    family: str,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    single: bool = False,
    **changes: Any,
) -> torch.nn.Module:
    """Build a tiny model of a family, with the same weights on every rank.

    Args:
        family: key of `FAMILIES`, `EXPERT_FAMILIES` or `OTHER_FAMILIES`.
        single: whether Mixtral's experts are `SingleExperts`.
        changes: changes to the configuration.
    """
    kind = (FAMILIES | EXPERT_FAMILIES | OTHER_FAMILIES)[family]
    torch.manual_seed(seed)
    config = getattr(transformers, kind.config)(vocab_size=vocabulary, use_cache=False, **{**kind.settings, **changes})
    model: torch.nn.Module = getattr(transformers, kind.model)(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():  # biases and norms too, so that a lost or doubled one shows
            param.add_(torch.randn(param.shape, generator=generator).to(dtype) * 0.05)
    for layer in model.model.layers if single else ():  # type: ignore[union-attr]
        layer.mlp.experts = SingleExperts(layer.mlp.experts)  # type: ignore[union-attr]
    return model


def tensor_parallel_settings(family: str, **changes: Any) -> dict[str, Any]:
    """Return the settings of DeepSpeed's ``tensor_parallel`` block besides the size.

    DeepSpeed refuses the plan that comes with Phi-3 (``rowwise_split_input``), and its own preset takes q, k and v for equally
    large, which they aren't with grouped queries.
    """
    if family == "phi3":
        return {"preset_model": "phi3"}
    if family == "qwen2_tied":  # transformers 5.18 and later ask for a tied head that is sharded by vocabulary
        return {"vocab_parallel_lm_head": False}
    if family != "phi3_medium":
        return {}
    settings = {**FAMILIES[family].settings, **changes}
    head = settings["hidden_size"] // settings["num_attention_heads"]
    query, key = settings["hidden_size"], settings["num_key_value_heads"] * head
    attention, mlp = r".*\.self_attn\.{}\.weight$", r".*\.mlp\.{}\.weight$"
    row = {"patterns": [attention.format("o_proj"), mlp.format("down_proj")], "partition_type": "row"}
    qkv = {"patterns": [attention.format("qkv_proj")], "shape": [[query, key, key], -1]}
    gate_up = {"patterns": [mlp.format("gate_up_proj")], "shape": [2, -1]}
    column = {"partition_type": "column", "partition_dim": 0}
    return {"partition_config": {"use_default_specs": False, "layer_specs": [row, qkv | column, gate_up | column]}}


def count_heads_here(model: torch.nn.Module) -> None:
    """Tell Phi-3's attention how many heads AutoTP has left on this rank: it splits fused q, k and v by their number."""
    for layer in model.modules():
        if isinstance(layer, transformers.models.phi3.modeling_phi3.Phi3Attention):
            whole: Any = layer.config
            layer.config = copy.copy(whole)
            size = layer.qkv_proj.tp_world_size if hasattr(layer.qkv_proj, "tp_world_size") else 1
            layer.config.num_attention_heads = whole.num_attention_heads // size
            layer.num_key_value_heads = whole.num_key_value_heads // size


def causal_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the whole logits for tokens: float32 of shape ``[batch, sequence, vocabulary]``; without gradient for a sharded
    head."""
    logits, head = _logits_here(model, tokens), _head_cut_by_vocabulary(model)
    if head is None:
        return logits
    shares: list[Any] = [None] * torch.distributed.get_world_size(head.mp_group)
    torch.distributed.all_gather_object(shares, logits.detach(), group=head.mp_group)
    return torch.cat(shares, dim=-1)


def mean_loss(model: Any, share: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next token over sequences that have one token more than the model is given."""
    logits, labels = _logits_here(model, share[:, :-1]).flatten(0, 1), share[:, 1:].flatten()
    head = _head_cut_by_vocabulary(model)
    if head is None:
        return torch.nn.functional.cross_entropy(logits, labels)
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

    losses: torch.Tensor = vocab_parallel_cross_entropy(
        logits, labels, head.mp_group, vocab_start_index=head.vocab_start_index, vocab_end_index=head.vocab_end_index
    )
    return losses.mean()


def _logits_here(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    arguments = {"decoder_input_ids": tokens} if hasattr(getattr(model, "module", model), "decoder") else {}
    logits: torch.Tensor = model(input_ids=tokens, **arguments).logits
    return logits.float()


def _head_cut_by_vocabulary(model: Any) -> Any:
    """Return the layer of AutoTP that leaves each rank the logits of its own tokens; None where the logits are whole."""
    return next((layer for layer in model.modules() if getattr(layer, "is_vocab_parallel_lm_head", False)), None)
