"""The models of `ucp_deepspeed.testing.megatron_models` as a DeepSpeed pipeline: one stage for each step of the forward pass.

Its layers, whatever the flavour: 0 word embedding, 1 positions, 2 to ``layers + 1`` transformer layers, then the final norm and
the output layer. Its loss and its initial weights of a seed equal those of the plain model.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from ucp_deepspeed.testing.megatron_models import (
    MegatronGptSize,
    causal_mask,
    initialise,
    transformer_config,
)

TIED_KEY = "embedding"


class WordEmbeddings(nn.Module):
    """Maps tokens of shape ``[batch, sequence]`` to hidden states ``[sequence, batch, hidden]``; if tied, it is the output layer
    too."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        rows = size.padded_vocabulary(config.tensor_model_parallel_size)
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            rows, config.hidden_size, init_method=config.embedding_init_method, config=config
        )
        initialise(self, size, seed, "embedding.")
        self.to(config.params_dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """See the class."""
        hidden: torch.Tensor = self.word_embeddings(tokens).transpose(0, 1)
        return hidden.contiguous()


def tied_logits(embeddings: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of a tied model's logits, ``[sequence, batch, vocabulary / degree]``."""
    hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return torch.matmul(hidden, embeddings.word_embeddings.weight.t())


class Positions(nn.Module):
    """Adds learned positions; adds nothing for rotary positions, or none."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        if not size.llama and size.positions:
            self.position_embeddings = nn.Embedding(size.sequence, config.hidden_size)
        initialise(self, size, seed, "embedding.")
        self.to(config.params_dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states to hidden states: ``[sequence, batch, hidden]``."""
        if not hasattr(self, "position_embeddings"):
            return hidden
        added: torch.Tensor = self.position_embeddings.weight[: hidden.shape[0]].unsqueeze(1)
        return hidden + added


class Layer(TransformerLayer):
    """One transformer layer that makes its own mask and rotary positions."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int, index: int) -> None:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm" if size.llama else None)
        super().__init__(config=config, submodules=spec.submodules, layer_number=index + 1)
        self._rotary = (
            RotaryEmbedding(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True) if size.llama else None
        )
        initialise(self, size, seed, f"decoder.layers.{index}.")
        self.to(config.params_dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states to hidden states: ``[sequence, batch, hidden]``."""
        rotary = self._rotary(hidden.shape[0]) if self._rotary is not None else None
        mask = causal_mask(hidden.shape[0], hidden.device)
        output: torch.Tensor = super().forward(hidden, attention_mask=mask, rotary_pos_emb=rotary)[0]
        return output


class FinalNorm(nn.Module):
    """The norm behind the last transformer layer."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        spec = get_gpt_layer_local_spec(normalization="RMSNorm" if size.llama else None)
        norm = spec.submodules.input_layernorm
        self.final_layernorm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        initialise(self, size, seed, "decoder.")
        self.to(config.params_dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states to hidden states."""
        output: torch.Tensor = self.final_layernorm(hidden)
        return output


class Output(nn.Module):
    """Output layer of an untied model: it maps hidden states to this rank's share of the logits."""

    def __init__(self, size: MegatronGptSize, config: TransformerConfig, seed: int) -> None:
        super().__init__()
        rows = size.padded_vocabulary(config.tensor_model_parallel_size)
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size, rows, config=config, init_method=config.init_method, bias=False
        )
        initialise(self, size, seed, "")
        self.to(config.params_dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the class."""
        logits: torch.Tensor = self.output_layer(hidden)[0]
        return logits


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, an fp32 scalar; ``logits`` are this rank's share, ``labels`` int64 of shape ``[batch,
    sequence]``."""
    target = labels.transpose(0, 1).contiguous()
    losses: torch.Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), target)
    return losses.mean()


def build_megatron_pipeline(
    size: MegatronGptSize,
    stages: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings: Any,
) -> PipelineModule:
    """Build a Megatron-Core GPT model as a pipeline; see `ucp_deepspeed.testing.megatron_models.build_megatron_gpt`.

    Args:
        stages: pipeline-parallel size; Megatron-Core's process groups must have been made for it.
        settings: further arguments of ``PipelineModule``, such as ``partition_method``.
    """
    model_parallel_cuda_manual_seed(seed)
    config = transformer_config(size, dtype, parallel_state.get_tensor_model_parallel_world_size())
    arguments = (size, config, seed)
    if size.tied:
        weight = {"tied_weight_attr": "word_embeddings.weight"}
        first = TiedLayerSpec(TIED_KEY, WordEmbeddings, *arguments, **weight)
        last = TiedLayerSpec(TIED_KEY, WordEmbeddings, *arguments, forward_fn=tied_logits, **weight)
    else:
        first, last = LayerSpec(WordEmbeddings, *arguments), LayerSpec(Output, *arguments)
    layers = [LayerSpec(Layer, *arguments, index) for index in range(size.layers)]
    specs = [first, LayerSpec(Positions, *arguments), *layers, LayerSpec(FinalNorm, *arguments), last]
    return as_pipeline(specs, stages, **settings)


def as_pipeline(layers: list[Any], stages: int, **settings: Any) -> PipelineModule:
    """Make a pipeline of layers on Megatron-Core's process groups; ``settings`` are further arguments of ``PipelineModule``."""
    degree, copies = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=degree, num_dp=copies)
    return PipelineModule(layers, loss_fn=next_token_loss, topology=topology, **settings)
