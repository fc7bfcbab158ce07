"""Run older versions of DeepSpeed under a newer torch than they were made for.

The replacements here only make them run; none is needed where DeepSpeed and torch were released at about the same time.
"""

from __future__ import annotations

from typing import Any

import torch

FLATTENS_IN_PLACE = "0.18.7"
"""First version that flattens ZeRO-1's and 2's weights in place."""

DETACHES = "0.19.0"
"""First version that detaches the result."""


def run_under_newer_torch() -> None:
    """Replace a function of DeepSpeed's, where it is needed. Called on a rank, before an engine is built.

    From 0.18.7 on ``DeepSpeedZeroOptimizer`` flattens the weights of a group in place, and up to 0.18.9 the flat tensor requires
    gradients. ``all_gather_dp_groups`` (``runtime/utils.py``) then writes into views of it, which torch 2.13 refuses ("Output 0
    of Split is a view and is being modified inplace"). The replacement detaches the flat tensor, as DeepSpeed does since 0.19.0.
    """
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from packaging.version import Version

    if not Version(FLATTENS_IN_PLACE) <= Version(deepspeed.__version__) < Version(DETACHES):
        return
    native = DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned

    def flatten_and_detach(optimizer: Any, *args: Any, **settings: Any) -> torch.Tensor:
        flat: torch.Tensor = native(optimizer, *args, **settings)
        return flat.detach()

    DeepSpeedZeroOptimizer.flatten_dense_tensors_aligned = flatten_and_detach
