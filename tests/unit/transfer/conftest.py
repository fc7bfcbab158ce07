"""For the tests of conversion and comparison: copies of checkpoints to change, and checkpoints written by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.language import Spec

SPEC = {
    "family": "tests",
    "rules": [
        {"match": ["first", "same", "new"], "pattern": "replicate"},
        {"match": "rows", "pattern": "shard", "dim": 0},
        {"match": "columns", "pattern": "shard", "dim": 1},
    ],
}


@pytest.fixture
def engine_copy(engine_checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """``engine_copy("zero1", "changed")``: a copy of an engine's tag folder, to change."""

    def copy(name: str, to: str) -> Path:
        return Path(shutil.copytree(engine_checkpoints[name], tmp_path / to / "step3"))

    return copy


@pytest.fixture
def view_of() -> Callable[..., UniversalView]:
    """The view of a tag folder, with the layouts of `native`'s model."""

    def view(folder: Path) -> UniversalView:
        return UniversalView.of(open_checkpoint(folder), Spec.parse(SPEC, "tests"))

    return view


@pytest.fixture
def native(tmp_path: Path) -> Callable[..., Path]:
    """``native("a", tp=2, stage=1)`` writes a small model's files; ``change`` edits its tensors, by (name, state), before."""

    def write(to: str, change: Callable[[dict[tuple[str, str], torch.Tensor]], None] | None = None, **run: Any) -> Path:
        generator = torch.Generator().manual_seed(7)
        shapes = {"first": (5,), "rows": (6, 8), "columns": (3, 10), "same": (4, 7)}
        states = ("fp32", "exp_avg", "exp_avg_sq")
        values = {(name, s): torch.randn(shape, generator=generator) for name, shape in shapes.items() for s in states}
        if change is not None:
            change(values)
        cuts: dict[str, Any] = {"rows": "rows", "columns": "columns"}
        parameters = tuple(
            NativeParameter(
                name,
                values[name, "fp32"],
                {state: values[name, state] for state in states[1:]},
                cut=cuts.get(name, "replicated"),
            )
            for name in shapes
        )
        return write_native(tmp_path / to, NativeModel(parameters, {"mask": torch.arange(4)}), NativeRun(**run))

    return write
