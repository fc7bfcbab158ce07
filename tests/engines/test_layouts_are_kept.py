"""Every later save records the layouts that a load knew. After one save under a spec no spec is needed again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import differences
from megatron.core import parallel_state
from torch import nn

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import read_manifest
from ucp_deepspeed.engine.known_layouts import KnownLayouts, keep_layouts
from ucp_deepspeed.layout.pattern import Replicate, Shard
from ucp_deepspeed.megatron import DeepSpeedMpu
from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state

Ranks = Callable[[int], RankPool]

VOCABULARY = 10
"""Rows without padding: on four ranks there are two more."""

SPEC = """
family: heron
rules:
  - {match: words, pattern: shard, dim: 0, vocabulary: true}
  - {match: fused, pattern: shard, dim: 0, parts: [2, 1]}
  - {match: out, pattern: shard, dim: 1}
  - {match: norm, pattern: replicate}
names:
  mine:
    - {from: "core.**", to: "**"}
"""

PATTERNS = {
    "core.words": Shard(0, vocabulary=True),
    "core.fused": Shard(0, parts=(2, 1)),
    "core.out": Shard(1),
    "core.norm": Replicate(),
}


class Heron(nn.Module):
    """A model of no family; no attribute tells how its parameters are cut. Each element's loss is the same on all ranks."""

    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        rows = -(-VOCABULARY // degree)
        shapes = {"words": (rows, 3), "fused": (24 // degree, 3), "out": (3, 8 // degree), "norm": (3,)}
        self.core = nn.ParameterDict({name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()})

    def forward(self) -> torch.Tensor:
        total: torch.Tensor = sum((value**2).sum() for value in self.core.values())  # type: ignore[assignment]
        return total


def chain_link(
    degree: int,
    stage: int,
    folder: str,
    loads: Sequence[str] = (),
    steps: int = 0,
    universal: Any = (),
    known: KnownLayouts | None = None,
) -> list[str]:
    """Build the model on so many tensor-parallel ranks, load, train and save; returns the forms of the loads."""
    reset_parallel_state()
    parallel_state.initialize_model_parallel(degree)
    config = {
        "train_batch_size": torch.distributed.get_world_size() // degree,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "universal_checkpoint": {"enabled": True, **dict(universal)},
    }
    model = Heron(degree, seed=len(loads))
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=model.parameters(), mpu=DeepSpeedMpu()
    )
    forms = []
    for source in loads:
        engine.load_checkpoint(source)
        forms.append("universal" if hasattr(engine, "universal_checkpoint_report") else "native")
    if known is not None:
        keep_layouts(engine, known)
    for _ in range(steps):
        engine.backward(engine())
        engine.step()
    engine.save_checkpoint(folder, tag="t")
    engine.destroy()
    del engine
    gc.collect()
    return forms


def spec_in(folder: Path) -> dict[str, Any]:
    (folder / "heron.yaml").write_text(SPEC)
    return {"spec": str(folder / "heron.yaml"), "vocabulary_size": VOCABULARY}


def recorded(folder: Path) -> tuple[Any, ...]:
    manifest = read_manifest(folder / "t")
    assert manifest is not None
    return manifest.patterns, manifest.logical_names, manifest.vocabulary_size


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_over_many_sizes_without_the_spec(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """TP4 under a spec, then TP2, TP1, TP1 by DeepSpeed's own load, TP4 again, with ``spec: auto``."""
    ranks(4).run(chain_link, 4, stage, str(tmp_path / "0"), steps=2, universal=spec_in(tmp_path))
    known = PATTERNS, {name: name.removeprefix("core.") for name in PATTERNS}, VOCABULARY
    assert recorded(tmp_path / "0") == known
    for number, (degree, form) in enumerate([(2, "universal"), (1, "universal"), (1, "native"), (4, "universal")], 1):
        source, saved = tmp_path / str(number - 1), tmp_path / str(number)
        assert ranks(degree).run(chain_link, degree, stage, str(saved), [str(source)])[0] == [form]
        assert recorded(saved) == known
        assert differences(tmp_path / "0", saved) == []


def test_another_load_ends_what_the_last_one_knew(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is known of a checkpoint that was saved without a spec, whatever was loaded before it."""
    ranks(1).run(chain_link, 1, 1, str(tmp_path / "known"), steps=1, universal=spec_in(tmp_path))
    ranks(1).run(chain_link, 1, 1, str(tmp_path / "unknown"), steps=1)
    sources = [str(tmp_path / "known"), str(tmp_path / "unknown")]
    for load in ("auto", "always", "never"):
        ranks(1).run(chain_link, 1, 1, str(tmp_path / load), sources, universal={"load": load})
        assert recorded(tmp_path / load) == ({}, {}, None)
        assert differences(tmp_path / "unknown", tmp_path / load) == []


def test_what_the_live_model_contradicts_isnt_recorded(ranks: Ranks, tmp_path: Path) -> None:
    """A pattern that can't join the live shapes, and names that the model doesn't have."""
    wrong = {"core.norm": Shard(4), "core.fused": Shard(0, parts=(2, 1)), "gone": Replicate()}
    known = KnownLayouts(wrong, {"gone": "other", "core.norm": "norm"}, None)
    ranks(2).run(chain_link, 2, 1, str(tmp_path), known=known)
    assert recorded(tmp_path) == ({"core.fused": Shard(0, parts=(2, 1))}, {"core.norm": "norm"}, None)
    assert open_checkpoint(tmp_path).recorded_shapes["core.fused"] == (24, 3)
