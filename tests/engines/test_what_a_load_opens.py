"""What a rank of an engine opens when it loads: no peer's metadata. DeepSpeed and DCP let every rank read that of all."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import STEP

from ucp_deepspeed.checkpoint import deepspeed_files
from ucp_deepspeed.checkpoint.manifest import read_manifest
from ucp_deepspeed.engine import model as engine_model
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train

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


def largest_message_of_all_ranks(run: Run) -> int:
    """Bytes of what a rank tells all others, or all of its model-parallel group, when the model is described."""
    engine = build_engine(run)
    sizes: list[int] = []
    real = engine_model.dist.all_gather_object

    def noting(gathered: list[Any], value: Any, group: Any = None) -> None:
        if len(gathered) == dist.get_world_size():
            sizes.append(len(pickle.dumps(value)))
        real(gathered, value, group=group)

    with mock.patch.object(engine_model.dist, "all_gather_object", noting):
        tensors = engine_model.describe_model(engine).tensors
    assert len(tensors) > 10
    return max(sizes, default=0)


def test_names_and_shapes_go_through_stages_once(ranks: Ranks) -> None:
    """Ranks of a stage compare what they hold, and then stages do, but not all ranks with all."""
    assert ranks(4).run(largest_message_of_all_ranks, SOURCE) == [0] * 4


def describe_with_one_too_many(run: Run) -> str:
    """What a rank hears when one rank of the last stage has a buffer that the other doesn't have."""
    engine = build_engine(run)
    if engine_model.model_parallel_rank(engine) == 3:
        list(engine.module.children())[-1].register_buffer("odd", torch.zeros(1))
    with pytest.raises(MismatchError, match="tensor-parallel ranks have different parameters") as caught:
        engine_model.describe_model(engine)
    return str(caught.value)


def test_a_difference_within_a_stage_is_told_on_all_ranks(ranks: Ranks) -> None:
    told = ranks(4).run(describe_with_one_too_many, SOURCE)
    assert all("odd" in text for text in told) and len(set(told)) == 1
