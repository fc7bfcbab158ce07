"""A small pipeline whose first and last stage share a module; only one parameter of it is tied.

A bias beside the tied weight is used only where the module makes logits, on the last stage, as in heads of published models.
"""

from __future__ import annotations

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

WIDTH = 8


class Words(nn.Module):
    """A vocabulary, and the bias of the logits that are made with it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, WIDTH) * 0.3)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return embeddings of tokens."""
        return nn.functional.embedding(tokens, self.weight)


def logits(words: Words, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits, which the last stage makes with the module."""
    return nn.functional.linear(hidden, words.weight.to(hidden.dtype), words.bias.to(hidden.dtype))


def mean_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy over all tokens."""
    return nn.functional.cross_entropy(found.float().flatten(0, -2), wanted.flatten())


class Layer(nn.Module):
    """A layer between the embedding and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the next hidden state."""
        return self.norm(torch.relu(self.linear(hidden)))


def build_tied_pipeline(stages: int, vocabulary: int, seed: int) -> PipelineModule:
    """Build the pipeline, with the same weights for any number of stages."""
    words = {"tied_weight_attr": "weight"}
    layers = [
        TiedLayerSpec("words", Words, vocabulary, **words),
        LayerSpec(Layer),
        LayerSpec(Layer),
        TiedLayerSpec("words", Words, vocabulary, forward_fn=logits, **words),
    ]
    return PipelineModule(
        layers, num_stages=stages, loss_fn=mean_loss, partition_method="uniform", seed_layers=True, base_seed=seed + 7
    )
