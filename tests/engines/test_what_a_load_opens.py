"""What a rank of an engine opens when it loads: no peer's metadata. DeepSpeed and DCP let every rank read that of all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from checkpoints import STEP

from ucp_deepspeed.checkpoint import deepspeed_files
from ucp_deepspeed.checkpoint.manifest import read_manifest
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train

Ranks = Callable[[int], RankPool]

SOURCE = Run("gpt", {"tied": False}, tp=2, pp=2, groups="decay", universal={"enabled": True, "load": "always"})


def opened_by_a_load(run: Run, folder: str) -> set[str]:
    """Names of the files that this rank opens while it loads."""
    names: set[str] = set()
    real = deepspeed_files.open_torch_file

    def noting(path: Path) -> dict[str, Any]:
        names.add(path.name)
        return real(path)

    with mock.patch.object(deepspeed_files, "open_torch_file", noting):
        train(run, STEP, load=folder)
    return names


def model_parallel_ranks(names: set[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.search(r"mp_rank_(\d+)_", name))}


@pytest.mark.parametrize("pp", [2, None])
def test_only_its_own_model_parallel_rank_and_the_first(pp: int | None, ranks: Ranks, tmp_path: Path) -> None:
    """Rank by rank: the first one tells what the run was at, the first of a stage its hyper-parameters."""
    source = replace(SOURCE, pp=pp)
    ranks(4).run(train, source, STEP, save=str(tmp_path))
    manifest = read_manifest(tmp_path / f"global_step{STEP}")
    assert manifest is not None and manifest.stages is not None and manifest.has_extra_states is False
    assert manifest.group_numbers == (((0, 1), (0, 1)) if pp else None)
    opened = ranks(4).run(opened_by_a_load, source, str(tmp_path))
    expected = [{0}, {0, 1}, {0, 2}, {0, 2, 3}] if pp else [{0}, {0, 1}, {0}, {0, 1}]
    assert [model_parallel_ranks(names) for names in opened] == expected
    assert not [name for names in opened for name in names if name.startswith("layer_")]


def test_only_its_own_experts(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank holds other experts than all the others."""
    run = Run("moe", size={"ep": (4, 4)}, universal={"enabled": True, "load": "always"})
    ranks(4).run(train, run, STEP, save=str(tmp_path))
    opened = ranks(4).run(opened_by_a_load, run, str(tmp_path))
    found = [{int(name.split("_")[3]) for name in names if name.endswith("_optim_states.pt")} for names in opened]
    assert found == [{0}, {0, 1}, {0, 2}, {0, 3}]
