"""The installed DeepSpeed has everything of its own objects that this package uses; what it has renamed is listed."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ucp_deepspeed.engine import deepspeed_types

CLASSES: dict[type, Any] = {
    deepspeed_types.Engine: DeepSpeedEngine,
    deepspeed_types.Pipeline: PipelineEngine,
    deepspeed_types.PipelineModule: PipelineModule,
    deepspeed_types.Zero12: DeepSpeedZeroOptimizer,
    deepspeed_types.Bf16: BF16_Optimizer,
    deepspeed_types.Zero3: DeepSpeedZeroOptimizer_Stage3,
    deepspeed_types.Fp16Unfused: FP16_UnfusedOptimizer,
    deepspeed_types.Fp16Fused: FP16_Optimizer,
}


def attributes(surface: type) -> set[str]:
    """Names that a protocol lists, without those that this package sets itself."""
    listed = {name for kind in surface.__mro__ for name in vars(kind).get("__annotations__", {})}
    return listed - deepspeed_types.OwnAttributes.__annotations__.keys()


def lacking(surface: type, kind: Any) -> list[str]:
    """Names that a class of DeepSpeed's neither defines nor sets."""
    source = "\n".join(inspect.getsource(each) for each in kind.__mro__ if each.__module__.startswith("deepspeed"))
    return sorted(
        name
        for name in attributes(surface)
        if not hasattr(kind, name) and not re.search(rf"\bself\.{name}\b[^=\n]*=(?!=)", source)
    )


@pytest.mark.parametrize("surface", CLASSES, ids=lambda surface: surface.__name__)
def test_deepspeed_has_what_is_used_of_it(surface: type) -> None:
    assert attributes(surface)
    assert lacking(surface, CLASSES[surface]) == []


def test_what_is_renamed_is_named() -> None:
    class Renamed(deepspeed_types.Zero12):
        fp32_partitions: Any

    assert lacking(Renamed, DeepSpeedZeroOptimizer) == ["fp32_partitions"]


def test_every_surface_is_looked_at() -> None:
    """Parts that several have in common are looked at with each of them."""
    listed = {
        kind
        for _, kind in inspect.getmembers(deepspeed_types, inspect.isclass)
        if kind.__module__ == deepspeed_types.__name__
    }
    assert listed == {base for surface in CLASSES for base in surface.__mro__ if base in listed}
