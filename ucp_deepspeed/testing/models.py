"""A tiny plain PyTorch model with the parameter and buffer shapes that checkpoints most often get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class TinyMlp(nn.Module):
    """Token classifier: embedding, layer norm, two linear layers, an odd-sized offset and a gain.

    Args:
        vocabulary: number of tokens and of classes.
        hidden: width of the embedding.
        ffn: width of the middle layer.
        odd: size of the odd-sized parameter; the last ``odd`` classes get an offset of their own.
        gain_shape: ``(1,)``, or ``()`` for a 0-d parameter.
        adapter: add ``adapter``, a linear layer beside the norm that begins as zero.
        idle: leave the adapter out of the forward pass, so that it never has a gradient.

    Attributes:
        gain: parameter of one element: scales the middle layer.
        odd_offset: parameter of shape ``[odd]``; an odd size leaves a remainder at every even data parallel degree.
        calibration: persistent floating-point buffer of shape ``[hidden]``, added to the embedding; never trained.
        calls: persistent 0-d int64 buffer: number of forward passes in training mode.
        scratch: buffer of shape ``[hidden]`` that is not persistent, so that no checkpoint holds it.
    """

    calibration: torch.Tensor
    calls: torch.Tensor
    scratch: torch.Tensor

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        ffn: int,
        odd: int,
        gain_shape: tuple[int, ...],
        adapter: bool,
        idle: bool,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.linear_in = nn.Linear(hidden, ffn)
        self.gain = nn.Parameter(torch.full(gain_shape, 1.5))
        self.linear_out = nn.Linear(ffn, vocabulary, bias=False)
        self.odd_offset = nn.Parameter(0.02 * torch.randn(odd))
        if adapter:
            self.adapter = nn.Linear(hidden, hidden)
            nn.init.zeros_(self.adapter.weight)
        self.idle = idle
        self.register_buffer("calibration", 0.1 * torch.randn(hidden))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(hidden), persistent=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of predicting ``labels`` from ``tokens``, both int64 of the same shape; an fp32
        scalar."""
        if self.training:
            self.calls.add_(1)
        embedded = self.embedding(tokens)
        embedded = self.norm(embedded + self.calibration.to(embedded.dtype))
        if hasattr(self, "adapter") and not self.idle:
            embedded = embedded + self.adapter(embedded)
        logits = self.linear_out(self.gain * nn.functional.gelu(self.linear_in(embedded)))
        offset = nn.functional.pad(self.odd_offset, (logits.shape[-1] - self.odd_offset.shape[0], 0))
        return nn.functional.cross_entropy((logits + offset).float().flatten(0, -2), labels.flatten())


class RememberingMlp(TinyMlp):
    """A `TinyMlp` with a complex buffer, and with values that are no tensors.

    Attributes:
        angles: persistent complex64 buffer of shape ``[3]``; no forward pass uses it.
        notes: the value that ``get_extra_state`` returns: a count of forward passes in training mode.
    """

    angles: torch.Tensor

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.register_buffer("angles", torch.polar(torch.ones(3), torch.randn(3)))
        self.notes = {"passes": 0}

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TinyMlp.forward`."""
        self.notes["passes"] += self.training
        return super().forward(tokens, labels)

    def get_extra_state(self) -> Any:
        """See ``notes``."""
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        """See ``notes``."""
        self.notes = state


class _Expert(nn.Module):
    """Two linear layers, and a persistent 0-d int64 buffer ``seen``: the number of tokens that came by in training mode.

    Args:
        cut: hold this tensor-parallel rank's share of both layers, as Megatron-Core's column- and row-parallel layers do.
            DeepSpeed can't copy those: they hold their process group.
    """

    seen: torch.Tensor

    def __init__(self, hidden: int, ffn: int, cut: bool) -> None:
        super().__init__()
        self.linear_in = nn.Linear(hidden, ffn)
        self.linear_out = nn.Linear(ffn, hidden, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.cut = cut
        if cut:
            for parameter, dim in ((self.linear_in.weight, 0), (self.linear_in.bias, 0), (self.linear_out.weight, 1)):
                _keep_share(parameter, dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += (states != 0).any(-1).sum()
        if not self.cut:
            out: torch.Tensor = self.linear_out(nn.functional.gelu(self.linear_in(states)))
            return out
        from megatron.core.tensor_parallel import mappings

        shared = mappings.copy_to_tensor_model_parallel_region(states)
        out = mappings.reduce_from_tensor_model_parallel_region(
            self.linear_out(nn.functional.gelu(self.linear_in(shared)))
        )
        return out


def _keep_share(parameter: nn.Parameter, dim: int) -> None:
    """Cut a parameter to this tensor-parallel rank's share and mark it as Megatron-Core does."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    degree, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    parameter.data = parameter.data.chunk(degree, dim)[rank].clone()
    set_tensor_model_parallel_attributes(parameter, True, dim, 1)


class TinyMoe(nn.Module):
    """The task of `TinyMlp` with DeepSpeed's mixture-of-experts layers between embedding and head.

    Each expert has room for all tokens and nothing is drawn at random, so that the loss doesn't depend on how many ranks hold the
    experts.

    Args:
        vocabulary: number of tokens and of classes.
        hidden: width of the embedding.
        ffn: width of each expert.
        experts: number of experts of each layer.
        ep: expert-parallel size of each layer.
        residual: add a layer with a dense branch beside its experts (``use_residual``).
        cut: partition each expert over the tensor-parallel ranks (``enable_expert_tensor_parallelism``); otherwise these ranks
            hold different experts.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        ffn: int,
        experts: tuple[int, ...],
        ep: tuple[int, ...],
        residual: bool,
        cut: bool,
    ) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        settings = {"use_rts": False, "enable_expert_tensor_parallelism": cut}
        self.layers = nn.ModuleList(
            MoE(hidden, _Expert(hidden, ffn, cut), total, size, capacity_factor=total, use_residual=dense, **settings)
            for total, size, dense in [
                *((total, size, False) for total, size in zip(experts, ep, strict=True)),
                *((experts[-1], ep[-1], True) for _ in range(residual)),
            ]
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """See `TinyMlp.forward`."""
        states = self.embedding(tokens)
        for layer in self.layers:
            states = states + layer(states)[0]
        return nn.functional.cross_entropy(self.head(self.norm(states)).float().flatten(0, -2), labels.flatten())


def build_moe(
    vocabulary: int = 48,
    hidden: int = 12,
    ffn: int = 9,
    experts: tuple[int, ...] = (4, 4),
    ep: tuple[int, ...] = (2, 2),
    residual: bool = False,
    cut: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TinyMoe:
    """Build a `TinyMoe`. Its initial values depend only on the seed, and not on ``ep``: DeepSpeed copies one expert."""
    return _seeded(seed, dtype, TinyMoe, vocabulary, hidden, ffn, experts, ep, residual, cut)


def build_mlp(
    vocabulary: int = 48,
    hidden: int = 20,
    ffn: int = 33,
    odd: int = 7,
    gain_shape: tuple[int, ...] = (1,),
    adapter: bool = False,
    idle: bool = False,
    remembers: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TinyMlp:
    """Build a `TinyMlp`. Its initial values depend only on the seed; the caller's random state stays as it was.

    Args:
        vocabulary: number of tokens and of classes.
        hidden: width of the embedding.
        ffn: width of the middle layer; odd by default.
        odd: size of the odd-sized parameter, at most ``vocabulary``.
        gain_shape: shape of the one-element parameter. With ``()`` it is 0-d: a plain PyTorch run can train and save it, and a
            DeepSpeed 0.19 engine refuses it at construction (it broadcasts parameters viewed as bytes).
        adapter, idle: see `TinyMlp`.
        remembers: whether it is a `RememberingMlp`.
        dtype: dtype of the parameters. Buffers keep their own.
        seed: seed of the initial values, which are drawn in fp32 and rounded.
    """
    kind = RememberingMlp if remembers else TinyMlp
    return _seeded(seed, dtype, kind, vocabulary, hidden, ffn, odd, gain_shape, adapter, idle)


def _seeded(seed: int, dtype: torch.dtype, make: Callable[..., M], *sizes: Any) -> M:
    """Make a model whose initial values depend only on the seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(*sizes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
