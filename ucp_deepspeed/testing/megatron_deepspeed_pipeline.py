"""Pipelines with the names of Megatron-DeepSpeed's ``GPTModelPipe``, made of Megatron-Core's tensor-parallel layers.

Layer 0 is a cast and layer 1 the embedding. Until 2023, and in BigScience's fork which trained BLOOM, layer 2 changes the order
of dimensions, and the transformer layers begin at 3. Since then they begin at 2 (``megatron/model/gpt_model.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import nn

from ucp_deepspeed.testing.megatron_deepspeed import LAYER, register
from ucp_deepspeed.testing.megatron_models import MegatronGptSize, transformer_config
from ucp_deepspeed.testing.megatron_pipeline import (
    Layer,
    Output,
    Positions,
    WordEmbeddings,
    as_pipeline,
    tied_logits,
)

TIED_KEY = "embed"


class EmbeddingPipe(nn.Module):
    """Maps tokens of shape ``[batch, sequence]`` to hidden states ``[sequence, batch, hidden]``."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int, embedding_norm: bool) -> None:
        super().__init__()
        words, positions = WordEmbeddings(size, config, seed), Positions(size, config, seed)
        self._whole = words, positions  # in a tuple, so that their own names aren't registered
        self.word_embeddings = words.word_embeddings
        if hasattr(positions, "position_embeddings"):
            self.position_embeddings = positions.position_embeddings
        if embedding_norm:
            self.word_embeddings.norm = nn.LayerNorm(config.hidden_size, dtype=config.params_dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        words, positions = self._whole
        hidden = words(tokens)
        if hasattr(self.word_embeddings, "norm"):
            hidden = self.word_embeddings.norm(hidden)
        output: torch.Tensor = positions(hidden)
        return output


class ParallelTransformerLayerPipe(nn.Module):
    """One transformer layer under Megatron-DeepSpeed's names."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int, index: int) -> None:
        super().__init__()
        self._layer = [Layer(size, config, seed, index)]
        for theirs, ours in LAYER.items():
            register(self, ours, self._layer[0].get_submodule(theirs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states to hidden states."""
        output: torch.Tensor = self._layer[0](hidden)
        return output


class LMHeadPipe(nn.Module):
    """Output layer of an untied model."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        self._output = [Output(size, config, seed)]
        self.lm_head = self._output[0].output_layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states to this rank's share of the logits."""
        logits: torch.Tensor = self._output[0](hidden)
        return logits


def unchanged(hidden: torch.Tensor) -> torch.Tensor:
    """Return the input. It takes the place where Megatron-DeepSpeed casts, or changes the order of dimensions: such layers have
    no parameters."""
    return hidden


def build_megatron_deepspeed_pipeline(
    size: MegatronGptSize,
    stages: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    embedding_norm: bool = False,
    reordering: bool = False,
    **settings: Any,
) -> PipelineModule:
    """Build a pipeline; see `ucp_deepspeed.testing.megatron_pipeline.build_megatron_pipeline`.

    Args:
        embedding_norm: whether a norm stands behind the embedding, as in BLOOM.
        reordering: whether layers that change the order of dimensions stand around the transformer layers.
    """
    model_parallel_cuda_manual_seed(seed)
    config = transformer_config(size, dtype, parallel_state.get_tensor_model_parallel_world_size())
    arguments = (size, config, seed)
    if size.tied:
        tied: dict[str, Any] = {"tied_weight_attr": "word_embeddings.weight"}
        first = TiedLayerSpec(TIED_KEY, EmbeddingPipe, *arguments, embedding_norm, **tied)
        last = TiedLayerSpec(TIED_KEY, EmbeddingPipe, *arguments, embedding_norm, forward_fn=tied_logits, **tied)
    else:
        first = LayerSpec(EmbeddingPipe, *arguments, embedding_norm)
        last = LayerSpec(LMHeadPipe, *arguments)
    norm = nn.RMSNorm if size.llama else nn.LayerNorm
    between = [unchanged] if reordering else []
    layers = [LayerSpec(ParallelTransformerLayerPipe, *arguments, index) for index in range(size.layers)]
    final = LayerSpec(norm, config.hidden_size, eps=config.layernorm_epsilon, dtype=dtype)
    return as_pipeline([unchanged, first, *between, *layers, *between, final, last], stages, **settings)
