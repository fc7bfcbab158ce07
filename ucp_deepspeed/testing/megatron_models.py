"""Tiny real Megatron-Core GPT models whose initial weights don't depend on the tensor parallel degree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

INITIAL_STD = 0.02
"""Standard deviation of initial weights and biases, and of the deviation of initial norm weights from 1."""


@dataclass(frozen=True, slots=True)
class MegatronGptSize:
    """Shape and flavour of a Megatron-Core GPT model; `gpt_flavour` and `llama_flavour` make the two usual ones.

    Attributes:
        layers: transformer layers.
        hidden: width of the residual stream.
        heads: query heads; divides ``hidden``.
        query_groups: key/value heads; divides ``heads``.
        ffn: width of the feed-forward layer, of the gate and of the up projection each.
        vocabulary: logical vocabulary size.
        vocabulary_multiple: the embedding is padded with rows of zeros to a multiple of this times the tensor
            parallel degree, as Megatron-LM does for ``--make-vocab-size-divisible-by``. The loss counts the padding
            as classes, so it agrees across degrees only where the padded sizes do.
        sequence: longest sequence, in tokens.
        tied: the output layer is the word embedding.
        llama: gated SiLU feed-forward layer, RMSNorm and rotary positions; otherwise GELU, LayerNorm and learned
            positions.
        bias: the linear layers have biases.
        qkv_bias: the attention input has a bias even when ``bias`` is off (Qwen2).
        qk_norm: queries and keys of each head are normalised (Qwen3).
        experts: experts of each feed-forward layer; two of them serve a token (Mixtral). 0 for a plain layer.
        latent: latent attention; the first layer is dense, and later layers have experts, one shared expert and a bias of the
            router (DeepSeek).
        positions: learned positions, without the Llama flavour; False for models that have none in their parameters (ALiBi).
        rotary: rotary positions without the Llama flavour, in place of learned ones (GPT-NeoX).
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 8
    query_groups: int = 8
    ffn: int = 128
    vocabulary: int = 256
    vocabulary_multiple: int = 1
    sequence: int = 32
    tied: bool = True
    llama: bool = False
    bias: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    latent: bool = False
    positions: bool = True
    rotary: bool = False

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.query_groups:
            raise ValueError(
                f"heads {self.heads} must divide hidden {self.hidden}, and be a multiple of query_groups "
                f"{self.query_groups}"
            )

    def padded_vocabulary(self, tensor_parallel: int) -> int:
        """Return the rows of the embedding over all ranks of a tensor parallel degree."""
        multiple = self.vocabulary_multiple * tensor_parallel
        return -(-self.vocabulary // multiple) * multiple


def gpt_flavour(**changes: Any) -> MegatronGptSize:
    """Return GPT-2/3 in small: LayerNorm, biases, GELU, learned positions, tied embedding; ``changes`` are fields to set."""
    return replace(MegatronGptSize(), **changes)


def llama_flavour(**changes: Any) -> MegatronGptSize:
    """Return Llama in small: RMSNorm, grouped-query attention, gated SiLU, rotary positions, untied output, no biases."""
    return replace(MegatronGptSize(query_groups=4, tied=False, llama=True, bias=False), **changes)


def build_megatron_gpt(size: MegatronGptSize, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPTModel:
    """Build a Megatron-Core GPT model on this rank's tensor parallel share, with Megatron-Core's own ("local") layers.

    Every rank must call it, after ``parallel_state.initialize_model_parallel`` and, without CUDA, after
    `ucp_deepspeed.testing.megatron_cpu.run_megatron_on_cpu`. It seeds Megatron-Core's generators with ``seed``. The
    model has no dropout, so that its loss is the same on every topology.

    Args:
        size: shape and flavour.
        dtype: dtype of all parameters; initial values are drawn in fp32 and rounded.
        seed: seed of the initial values. The same seed gives the same logical tensors at any tensor parallel degree.

    Returns:
        The model, on the CPU, whole (one pipeline stage).
    """
    model_parallel_cuda_manual_seed(seed)
    degree = parallel_state.get_tensor_model_parallel_world_size()
    config = transformer_config(size, dtype, degree)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(size, config),
        vocab_size=size.padded_vocabulary(degree),
        max_sequence_length=size.sequence,
        share_embeddings_and_output_weights=size.tied,
        position_embedding_type=_positions(size),
    )
    initialise(model, size, seed)
    if size.experts:
        prepare_experts(model)
    if size.qk_norm:
        sum_gradients_of_head_norms(model)
    return model.to(dtype)


def _positions(size: MegatronGptSize) -> str:
    if size.llama or size.rotary:
        return "rope"
    return "learned_absolute" if size.positions else "none"


def layer_spec(size: MegatronGptSize, config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Return Megatron-Core's own ("local") layers: one specification for all or, where the first has no experts, one for each."""
    norm = "RMSNorm" if size.llama else None
    if not size.latent:
        return get_gpt_layer_local_spec(
            num_experts=size.experts or None,
            moe_grouped_gemm=False,
            normalization=norm,
            qk_layernorm=size.qk_norm,
        )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=norm)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    return block


class LatentDotProductAttention(DotProductAttention):
    """Megatron-Core's own attention, without parameters, whose values may be wider or narrower than keys: it takes these with
    CUDA only."""

    def __init__(
        self, *positional: Any, k_channels: int | None = None, v_channels: int | None = None, **named: Any
    ) -> None:
        super().__init__(*positional, **named)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def prepare_experts(model: torch.nn.Module) -> None:
    """Let experts be trained under tensor parallelism alone. Megatron-Core refuses this while training, as it is slow.

    Its sequence parallelism needs norms of Apex or Transformer Engine, and these need CUDA.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.training = False
            if (
                module.router.expert_bias is not None
            ):  # as if balancing had moved it: it is to change which experts serve
                module.router.expert_bias.copy_(torch.linspace(-0.05, 0.05, module.router.expert_bias.numel()))


def sum_gradients_of_head_norms(model: torch.nn.Module) -> None:
    """Add up the gradients of queries' and keys' norms over the tensor-parallel ranks: each of these sees only its own heads.

    Megatron-Core's trainer does this (``distributed/finalize_model_grads.py``), DeepSpeed doesn't. Without it, the ranks' copies
    of these norms drift apart, and aren't replicated but partial.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("q_layernorm", "k_layernorm"):
            parameter.register_hook(summed)


def causal_mask(sequence: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a mask that hides later tokens: bool of shape ``[1, 1, sequence, sequence]``, True where attention is forbidden."""
    return torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=device).triu(diagonal=1)


def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross entropy of a batch.

    Args:
        model: a model of `build_megatron_gpt`, or an engine around one.
        tokens: int64 of shape ``[batch, sequence + 1]``; each position but the last predicts the next one.

    Returns:
        fp32 scalar, the same on all tensor parallel ranks.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    losses: torch.Tensor = model(inputs, positions, causal_mask(inputs.shape[1], tokens.device), labels=labels)
    return losses.float().mean()


@torch.no_grad()
def initialise(model: torch.nn.Module, size: MegatronGptSize, seed: int, prefix: str = "") -> None:
    """Fill every parameter with this rank's share of a logical tensor that depends only on its name and the seed.

    Biases and norms get random values too, so that a misplaced element shows.

    Args:
        model: on this rank's tensor parallel share; changed in place.
        size: the size that it was built with, for the rows of the vocabulary that are padding (set to zero).
        seed: seed of the values.
        prefix: the beginning of the names in the whole model, when ``model`` is a part of it.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    degree = parallel_state.get_tensor_model_parallel_world_size()
    for local_name, parameter in model.named_parameters():
        name = prefix + local_name
        split = bool(getattr(parameter, "tensor_model_parallel", False))
        shape = list(parameter.shape)
        if split:
            shape[parameter.partition_dim] *= degree
        padded_rows = 0
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            padded_rows, shape[0] = shape[0] - size.vocabulary, size.vocabulary
        logical = logical_tensor(name, tuple(shape), seed)
        if padded_rows:
            logical = torch.cat([logical, torch.zeros(padded_rows, *shape[1:])])
        if split:
            logical = local_share(logical, parameter.partition_dim, parameter.partition_stride, rank, degree)
        parameter.copy_(logical)


def logical_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return initial values of a whole parameter, in fp32: normal, around 1 for norm weights and around 0 for all others.

    Args:
        name: the parameter's name; chooses the values, together with the seed.
        shape: logical (whole, unpadded) shape.
        seed: seed of the values.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values = torch.randn(shape, generator=generator) * INITIAL_STD
    return values + 1 if "layernorm" in name and name.endswith("weight") else values


def local_share(logical: torch.Tensor, dim: int, stride: int, rank: int, degree: int) -> torch.Tensor:
    """Return one tensor parallel rank's share of a whole parameter, laid out as Megatron-Core does.

    Args:
        logical: the whole parameter.
        dim: Megatron-Core's ``partition_dim``.
        stride: its ``partition_stride``: number of parts (gate and up) that are split one by one and lie side by
            side in each rank. Query/key/value weights have 1: query groups are contiguous, so that a plain cut keeps
            them whole where the degree divides their number, and Megatron-Core gathers the outputs where it doesn't.
        rank: tensor parallel rank.
        degree: tensor parallel degree.
    """
    return torch.cat(logical.chunk(stride * degree, dim)[rank::degree], dim)


def transformer_config(size: MegatronGptSize, dtype: torch.dtype, degree: int) -> TransformerConfig:
    """Return Megatron-Core's configuration of a size: no dropout, no fusion that needs CUDA, softmax in fp32."""
    kind = MLATransformerConfig if size.latent else TransformerConfig
    return kind(
        **(experts_config(size) if size.experts else {}),
        **(latent_config(size) if size.latent else {}),
        num_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_query_groups=size.query_groups,
        ffn_hidden_size=size.ffn,
        tensor_model_parallel_size=degree,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        normalization="RMSNorm" if size.llama else "LayerNorm",
        gated_linear_unit=size.llama,
        activation_func=torch.nn.functional.silu if size.llama else torch.nn.functional.gelu,
        add_bias_linear=size.bias,
        add_qkv_bias=size.qkv_bias,
        qk_layernorm=size.qk_norm or size.latent,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )


def experts_config(size: MegatronGptSize) -> dict[str, Any]:
    """Return Megatron-Core's settings of experts: each is a module of its own, two serve each token, and the router has no loss.

    The dispatcher that gathers all tokens is the one that works without CUDA.
    """
    return {
        "num_moe_experts": size.experts,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": size.ffn,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


def latent_config(size: MegatronGptSize) -> dict[str, Any]:
    """Return DeepSeek's settings in small: all ranks and head dimensions differ, so that a mix-up shows."""
    return {
        "multi_latent_attention": True,
        "q_lora_rank": 16,
        "kv_lora_rank": 20,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "rope_type": "rope",
        "moe_layer_freq": [0] + [1] * (size.layers - 1),
        "moe_shared_expert_intermediate_size": size.ffn // 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
