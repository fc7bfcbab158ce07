"""Shared by the tests of damage: a checkpoint to damage, and the check that it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeRun

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UniversalCheckpointError

ZERO_2 = NativeRun(stage=2, dp=2, precision="bf16")
LAST = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
FIRST = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def read_all(folder: Path) -> Checkpoint:
    """Open, and locate every element of every state."""
    checkpoint = open_checkpoint(folder)
    view = UniversalView.of(checkpoint)
    for name, parameter in checkpoint.parameters.items():
        numel = torch.Size(view.logical_shape(name)).numel()
        for state in parameter.states:
            assert sum(part.numel for part in checkpoint.fragments(name, state, 0, 0, numel)) == numel
    return checkpoint


def refused(folder: Path, error: type[UniversalCheckpointError], *parts: str) -> None:
    with pytest.raises(error) as caught:
        read_all(folder)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file of this test holds."""
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)
