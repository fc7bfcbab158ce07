"""The cost of planning a rank of a model that doesn't fit here; no time is looked at."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ucp_deepspeed.layout import Topology

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

CODE = f"""
import json, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from simulate_scale import Topology, asdict, measure

dense = measure("1t", Topology(8, 64, 2, 1), Topology(8, 32, 3, 1))
sliced = measure("7b", Topology(1, 1, 1024, 3), Topology(1, 1, 512, 3))
print(json.dumps({{"1t": asdict(dense), "7b": asdict(sliced)}}))
"""


@pytest.fixture(scope="module")
def costs() -> dict[str, dict[str, Any]]:
    """Measure in a process that has done nothing else: memory that pytest has free would hide what a plan takes."""
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_rank_of_a_trillion_parameters_needs_little(costs: dict[str, dict[str, Any]]) -> None:
    """1,024 → 768 ranks: the second of three that share a tensor-parallel rank of four layers, and no other rank's files."""
    cost = costs["1t"]
    hidden, ffn, tp = 25600, 68096, 8
    layer = (3 * hidden * hidden + hidden * hidden + 3 * ffn * hidden) // tp + 2 * hidden
    assert abs(cost["bytes_read"] - 12 * 4 * layer // 3) <= 12 * 16  # partitions begin at multiples of a few elements
    assert cost["bytes_held"] == cost["bytes_read"]
    assert (cost["source_ranks"], cost["target_ranks"]) == (1024, 768)
    assert cost["files"] <= 2 * 2 and cost["opened"] <= 10
    assert 0 < cost["memory"] <= 300e6


def test_a_rank_opens_few_of_thousands_of_files(costs: dict[str, dict[str, Any]]) -> None:
    """ZeRO-3: each rank of half as many reads what two have written, padding aside, though the folder holds thousands."""
    cost = costs["7b"]
    hidden, ffn, layers, rows = 4096, 11008, 32, 32768
    layer = 4 * hidden * hidden + 3 * ffn * hidden + 2 * hidden
    assert cost["bytes_read"] == 12 * (layers * layer + hidden + 2 * rows * hidden) // 512
    assert cost["files"] == 2 and cost["opened"] <= 4


def test_the_manifest_lists_every_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script: ModuleType = importlib.import_module("simulate_scale")
    topology = Topology(1, 1, 4, 1, 2)
    model = script.Model("small", 2, 8, 0, 16, experts=4, expert_ffn=4)
    script.Saved(model, topology, tmp_path).write()
    manifest = script.manifests.read_manifest(tmp_path / script.TAG)
    there = {path.name for path in (tmp_path / script.TAG).iterdir()} - {script.MANIFEST_NAME}
    assert set(manifest.files) == there
    optimizers, weights, random_states, expert_weights, expert_optimizers = 4, 1, 1, 2 * 4, 2
    assert len(there) == optimizers + weights + random_states + expert_weights + expert_optimizers
    assert set(manifest.contents) == {"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"}
