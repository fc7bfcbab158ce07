"""What planning a rank of a model that doesn't fit here costs; no time is looked at."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ucp_deepspeed.layout import Topology

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate_scale.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_scale", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["simulate_scale"] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_rank_of_a_trillion_parameters_needs_little(script: ModuleType) -> None:
    """1,024 → 768 ranks: the second of three that share a tensor-parallel rank of four layers, and no other rank's files."""
    cost = script.measure("1t", Topology(8, 64, 2, 1), Topology(8, 32, 3, 1))
    hidden, ffn, tp = 25600, 68096, 8
    layer = (3 * hidden * hidden + hidden * hidden + 3 * ffn * hidden) // tp + 2 * hidden
    assert abs(cost.bytes_read - 12 * 4 * layer // 3) <= 12 * 16  # partitions begin at multiples of a few elements
    assert cost.bytes_held == cost.bytes_read
    assert (cost.source_ranks, cost.target_ranks) == (1024, 768)
    assert cost.files <= 2 * 2 and cost.opened <= 10
    assert 0 < cost.memory <= 300e6


def test_a_rank_opens_few_of_thousands_of_files(script: ModuleType) -> None:
    """ZeRO-3: each rank of half as many reads what two have written, padding aside, though the folder holds thousands."""
    cost = script.measure("7b", Topology(1, 1, 1024, 3), Topology(1, 1, 512, 3))
    hidden, ffn, layers, rows = 4096, 11008, 32, 32768
    layer = 4 * hidden * hidden + 3 * ffn * hidden + 2 * hidden
    assert cost.bytes_read == 12 * (layers * layer + hidden + 2 * rows * hidden) // 512
    assert cost.files == 2 and cost.opened <= 4


def test_the_manifest_lists_every_file(script: ModuleType, tmp_path: Path) -> None:
    topology = Topology(1, 1, 4, 1, 2)
    model = script.Model("small", 2, 8, 0, 16, experts=4, expert_ffn=4)
    script.Saved(model, topology, tmp_path).write()
    manifest = script.manifests.read_manifest(tmp_path / script.TAG)
    there = {path.name for path in (tmp_path / script.TAG).iterdir()} - {script.MANIFEST_NAME}
    assert set(manifest.files) == there
    assert (
        len(there) == 4 + 1 + 4 + 2 * 4 + 2
    )  # optimizer, weights, random states, experts' weights, experts' optimizers
    assert set(manifest.contents) == {"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"}
