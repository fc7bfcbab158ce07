"""Run Megatron-Core's GPT models on CPU ranks, over gloo and without a GPU.

Megatron-Core 0.15 and 0.16 have a CPU initialisation path (``use_cpu_initialization``) but no CPU execution path: a handful of
places ask CUDA for the current device or for the state of its generator. This module replaces only those. The tensor-parallel
layers, the collectives, the loss and the autograd functions are Megatron-Core's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils

_MODEL_PARALLEL_STATE = "model-parallel-rng"
_DEFAULT_STATE = "default-rng"


def run_megatron_on_cpu() -> bool:
    """Make Megatron-Core run on CPU ranks of this process; do nothing where CUDA is available.

    It replaces these, for these reasons:

    * ``torch.cuda.current_device`` answers DeepSpeed's device: the CPU, or that of `ucp_deepspeed.testing.device`.
      Megatron-Core passes it as ``device=`` when it allocates: the global memory buffer (every attention layer multiplies
      into it), the outputs of its collectives, position tables.
    * ``CudaRNGStatesTracker.add`` and ``fork`` keep and switch the states of the CPU generator instead of the CUDA one.
      `fork` surrounds dropout in every attention layer, so the model can't run a forward pass without it. A state that
      was never added leaves the generator as it is, so that a model without dropout needs no seeding.
    * ``moe_utils.te_general_gemm`` is None where Transformer Engine is missing: the router asks for the name all the same.
    * ``multi_latent_attention.HAVE_TE`` is set to False there: it is True although the classes that it stands for are missing.

    Attention masks stay the caller's business: Megatron-Core builds a missing causal mask on the device ``"cuda"``, so
    pass one to the model (`ucp_deepspeed.testing.megatron_models.causal_mask`).

    Call it once in each rank, before the first model is built; later calls change nothing. It is meant for tests and
    demonstrations: it changes ``torch.cuda`` for the whole process.

    Returns:
        Whether Megatron-Core runs on CPU in this process: False where CUDA is available and nothing was replaced.
    """
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    megatron_random.CudaRNGStatesTracker.add = _add_cpu_state
    megatron_random.CudaRNGStatesTracker.fork = _fork_cpu_state
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False
    return True


def _current_device() -> torch.device:
    """Return the device to allocate on: the accelerator's, in most cases the CPU."""
    return torch.device(get_accelerator().current_device_name())


def _add_cpu_state(tracker: megatron_random.CudaRNGStatesTracker, name: str, seed: int) -> None:
    """Keep, under a name, the CPU generator's state for a seed; replaces ``CudaRNGStatesTracker.add``.

    Args:
        tracker: the tracker of this rank.
        name: the name that `fork` will ask for.
        seed: seed of this state; no two states of a tracker may share it.

    Raises:
        ValueError: the seed or the name is taken.
    """
    if seed in tracker.seeds_ or name in tracker.states_:
        raise ValueError(f"random state {name!r} with seed {seed} is already in the tracker")
    tracker._is_initialized = True
    tracker.seeds_.add(seed)
    tracker.states_[name] = torch.Generator().manual_seed(seed).get_state()


@contextlib.contextmanager
def _fork_cpu_state(tracker: megatron_random.CudaRNGStatesTracker, name: str = _MODEL_PARALLEL_STATE) -> Iterator[None]:
    """Draw from the named state inside the block; replaces ``CudaRNGStatesTracker.fork``.

    Args:
        tracker: the tracker of this rank.
        name: the state to draw from; one that was never added leaves the CPU generator alone.
    """
    if name not in tracker.states_:
        yield
        return
    # Megatron-Core before 0.16 doesn't keep the name; only nested calls need it.
    outer_name, outer_state = getattr(tracker, "_current_state_name", _DEFAULT_STATE), torch.get_rng_state()
    if outer_name != _DEFAULT_STATE:
        tracker.states_[outer_name] = outer_state
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer_state if outer_name == _DEFAULT_STATE else tracker.states_[outer_name])
        tracker._current_state_name = outer_name
