"""Tiny models with the names of Megatron-DeepSpeed (it can't be installed), made of Megatron-Core's tensor-parallel layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
"""Modules of a layer in Megatron-Core → their names in Megatron-DeepSpeed (``megatron/model/transformer.py``)."""


class MegatronDeepSpeedModel(nn.Module):
    """A model of Megatron-Core whose modules have the names of Megatron-DeepSpeed's ``GPTModel``.

    Attributes:
        embedding_norm: whether a norm stands behind the embedding, as in BLOOM.
    """

    def __init__(self, core: GPTModel, embedding_norm: bool) -> None:
        super().__init__()
        self._core = [core]  # in a list, so that its own names aren't registered
        register(self, "language_model.embedding.word_embeddings", core.embedding.word_embeddings)
        if hasattr(core.embedding, "position_embeddings"):
            register(self, "language_model.embedding.position_embeddings", core.embedding.position_embeddings)
        if embedding_norm:
            norm = nn.LayerNorm(core.config.hidden_size, dtype=core.embedding.word_embeddings.weight.dtype)
            core.embedding.word_embeddings.norm = norm
            core.embedding.word_embeddings.register_forward_hook(lambda module, inputs, output: module.norm(output))
        for number, layer in enumerate(core.decoder.layers):
            for theirs, ours in LAYER.items():
                register(self, f"language_model.encoder.layers.{number}.{ours}", layer.get_submodule(theirs))
        register(self, "language_model.encoder.final_layernorm", core.decoder.final_layernorm)
        if not core.share_embeddings_and_output_weights:
            register(self, "language_model.output_layer", core.output_layer)

    def forward(self, *inputs: torch.Tensor, **named: Any) -> torch.Tensor:
        """Call the model of Megatron-Core."""
        output: torch.Tensor = self._core[0](*inputs, **named)
        return output


def register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module known to another under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)


def universal_checkpoint_info(vocabulary: int, gated: bool, embedding_norm: bool) -> Mapping[str, Any]:
    """Return the layouts that Megatron-DeepSpeed saves for such a model
    (``megatron/model/gpt_model.py::universal_checkpoint_info``)."""
    layer = r"language_model\.encoder\.layers\.\d+\."
    norms = [layer + r"(input|post_attention)_layernorm\.", r"language_model\.encoder\.final_layernorm\."]
    biases = [layer + r"self_attention\.dense\.bias", layer + r"mlp\.dense_4h_to_h\.bias"]
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": vocabulary,
        "vocabulary_parameter_patterns": [
            r"language_model\.embedding\.word_embeddings\.weight",
            r"language_model\.output_layer\.weight",
        ],
        "tp_replicated_parameter_patterns": [*norms, *biases, r"language_model\.embedding\.position_embeddings\."],
        "parameter_to_average_patterns": [r".*word_embeddings\.norm\."] if embedding_norm else [],
        "parameter_with_row_parallelism_patterns": [
            layer + r"self_attention\.dense\.weight",
            layer + r"mlp\.dense_4h_to_h\.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": [layer + r"mlp\.dense_h_to_4h\.weight"] if gated else [],
    }
