"""A rank of an engine that loads opens no peer's metadata. With DeepSpeed and DCP every rank reads everyone's."""

from __future__ import annotations

import ctypes
import gc
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import STEP

from ucp_deepspeed.checkpoint.deepspeed.manifest import read_manifest
from ucp_deepspeed.engine import agreement
from ucp_deepspeed.engine import model as engine_model
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

SOURCE = Run("gpt", {"tied": False}, tp=2, pp=2, groups="decay", universal={"enabled": True, "load": "always"})


_opened: set[str] | None = None
"""Paths that this process opens, while somebody wants to know."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | Path):
        _opened.add(str(arguments[0]))


@lru_cache(maxsize=1)
def _begin_to_note() -> None:
    sys.addaudithook(_note)  # for the rest of the process


@contextmanager
def opened(folder: str) -> Iterator[set[str]]:
    """Names of the files of a folder that this process opens in the block, whoever opens them."""
    global _opened
    _begin_to_note()
    names: set[str] = set()
    _opened = set()
    try:
        yield names
    finally:
        names |= {Path(path).name for path in _opened if Path(path).is_relative_to(folder) and Path(path).is_file()}
        _opened = None


def opened_by_a_load(run: Run, folder: str) -> set[str]:
    """Names of the files that this rank opens while it loads."""
    with opened(folder) as names:
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


@pytest.mark.parametrize("stage", [1, 3])
def test_only_partitions_that_it_needs(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """And of them each once for what they hold: the first tells of the run, and has the first elements anyway."""
    run = Run("mlp", zero={"stage": stage}, universal={"enabled": True, "load": "always"})
    ranks(4).run(train, run, STEP, save=str(tmp_path))
    found = ranks(2).run(opened_by_a_load, replace(run, zero={"stage": 1}), str(tmp_path))
    partitions = [{name.split("_")[3] for name in names if name.endswith("_optim_states.pt")} for names in found]
    if stage == 1:
        assert partitions == [{"0", "1"}, {"0", "2", "3"}]
    else:  # which cuts each parameter over all ranks
        assert partitions == [{"0", "1", "2", "3"}] * 2
    others = [{name for name in names if "_optim_states" not in name} for names in found]
    states = {"zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"}
    wanted = states | {"ucp_manifest.json", "latest", "ucp_random_states.jsonl", "ucp_checksums.jsonl"}
    assert [names - wanted for names in others] == [set()] * 2


class Taken(NamedTuple):
    """By a load, on one rank, in bytes.

    Attributes:
        reported: read, by its own report.
        checked: those of them that were checked, by its report.
        read: read by the process, whatever it was for.
        memory: at the peak, beyond what there was before.
    """

    reported: int
    checked: int
    read: int
    memory: int


def taken_by_a_load(run: Run, folder: str) -> Taken:
    """Without memory maps, by which a process reads what the system doesn't count, and the second of two: what imports and
    threads take isn't of interest."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    with mock.patch.object(torch, "from_file", side_effect=RuntimeError("no maps")):
        engine.load_checkpoint(folder)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory freed by the first load must not serve the second
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, read = _status("VmRSS"), _characters_read()
        engine.load_checkpoint(folder)
        report = engine.universal_checkpoint_report
        found = Taken(report.bytes_read, report.bytes_checked, _characters_read() - read, _status("VmHWM") - before)
    engine.destroy()
    return found


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def _characters_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


WIDE = {"hidden": 64, "ffn": 1 << 16, "layers": 1}
"""16 MiB of ``linear_fc2.weight``, whose columns tensor parallelism cuts."""

DEEP = {"hidden": 64, "ffn": 220, "layers": 48}
"""8 MiB of tensors that travel together."""

MEMORY = 1 << 20


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        (Run("gpt", WIDE, zero={"stage": 1}), {}),
        (Run("gpt", WIDE, zero={"stage": 3}), {}),
        (Run("gpt", WIDE, zero={"stage": 0}), {"shared_read_bytes": 0}),
        (Run("gpt", WIDE, tp=2, zero={"stage": 1}), {}),
        (
            Run("gpt", WIDE, precision="bf16", zero={"stage": 1, "load_from_fp32_weights": False}),
            {},
        ),
        (Run("gpt", DEEP, zero={"stage": 0}), {"shared_read_bytes": 0}),
    ],
    ids=["joined", "joined, partitioned", "joined, exchanged", "cut", "rounded", "many small ones, exchanged"],
)
@pytest.mark.parametrize("source_tp", [1, 2])
@pytest.mark.parametrize("verify", ["off", "pieces"])
def test_it_reads_and_takes_as_much_as_it_says(
    source_tp: int, target: Run, settings: dict[str, Any], verify: str, ranks: Ranks, tmp_path: Path, device: str
) -> None:
    """Pieces that a rank reads in part, or with gaps, it reads again for their checksums, in whole."""
    universal = {"enabled": True, "load": "always", "read_memory_bytes": MEMORY, "verify": verify, **settings}
    source = Run("gpt", target.size, tp=source_tp, precision=target.precision, universal=universal)
    ranks(2).run(train, source, STEP, save=str(tmp_path))
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.pt"))
    taken = ranks(2).run(taken_by_a_load, replace(target, universal=universal), str(tmp_path))
    assert sum(each.reported for each in taken) <= 1.05 * held
    for each in taken:
        again = 1.3 * each.reported if verify == "pieces" else 0
        assert each.reported <= each.read <= each.reported + again + (2 << 20)  # headers, manifest, /proc
        assert each.checked >= 0.99 * each.reported if verify == "pieces" else each.checked == 0
        if device == "cpu":  # the stand-in's own memory is the host's too
            assert each.memory <= MEMORY + (4 << 20) + (
                6 << 20 if again else 0
            )  # and the plan; a piece for each thread


def largest_message_of_all_ranks(run: Run) -> int:
    """Bytes of what a rank tells all others, or all of its model-parallel group, when the model is described."""
    engine = build_engine(run)
    sizes: list[int] = []

    def noting(name: str) -> Any:
        real = getattr(agreement, name)

        def call(*arguments: Any) -> list[Any]:
            found: list[Any] = real(*arguments)
            if len(found) == dist.get_world_size():
                sizes.append(len(pickle.dumps(arguments[-1])))
            return found

        return call

    with (
        mock.patch.object(agreement, "gathered", noting("gathered")),
        mock.patch.object(engine_model, "gathered_in", noting("gathered_in")),
    ):
        tensors = engine_model.describe_model(engine).tensors
    assert len(tensors) > 10
    return max(sizes, default=0)


def test_names_and_shapes_go_through_stages_once(ranks: Ranks) -> None:
    """Ranks of a stage compare what they hold, and then stages do, but not all ranks with all."""
    assert ranks(4).run(largest_message_of_all_ranks, SOURCE) == [0] * 4


def describe_with_one_too_many(run: Run) -> str:
    """Return the error of a rank when one rank of the last stage has a buffer that the other doesn't have."""
    engine = build_engine(run)
    if engine_model.model_parallel_rank(engine) == 3:
        list(engine.module.children())[-1].register_buffer("odd", torch.zeros(1))
    with pytest.raises(MismatchError, match="tensor-parallel ranks have different parameters") as caught:
        engine_model.describe_model(engine)
    return str(caught.value)


def test_a_difference_within_a_stage_is_told_on_all_ranks(ranks: Ranks) -> None:
    told = ranks(4).run(describe_with_one_too_many, SOURCE)
    assert all("odd" in text for text in told) and len(set(told)) == 1
