"""Native → universal → engine → native, and what a load reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import STEP, Source, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import PerRank
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.commit import write_atomically
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

GetSource = Callable[[str, Run, int], Source]

NATIVE = Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay")


@pytest.mark.parametrize(
    ("target", "world_size"),
    [
        (Run("llama", tp=1, zero={"stage": 3}, precision="bf16", groups="decay"), 2),
        (Run("llama", tp=4, zero={"stage": 2}, precision="bf16", groups="decay"), 4),
        (Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay"), 4),
        (Run("llama", tp=1, zero={"stage": 0}, precision="bf16", groups="decay"), 1),
    ],
    ids=["tp1dp2-zero3", "tp4dp1-zero2", "tp2dp2-zero1", "tp1dp1-zero0"],
)
def test_native_universal_engine_native(
    target: Run, world_size: int, source: GetSource, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    saved = source("zero1-bf16", NATIVE, 4)
    tag = f"global_step{STEP}"
    universal = tmp_path / "universal"
    convert(UniversalView.of(open_checkpoint(saved.folder)), universal / tag)
    write_atomically(universal / "latest", tag)
    assert differences(saved.folder, universal) == []

    outcome = ranks(world_size).run(train, target, STEP, load=str(universal), save=str(tmp_path / "native"))

    assert outcome[0].report.source.startswith("universal 2")
    assert differences(saved.folder, tmp_path / "native") == []
    assert differences(universal, tmp_path / "native") == []
    assert outcome[0].counters == {"global_steps": STEP, "global_samples": STEP * 8, "skipped_steps": 0}


@pytest.mark.parametrize("stage", [1, 3])
def test_each_rank_reads_what_its_partitions_hold(
    stage: int, source: GetSource, ranks: Callable[[int], RankPool]
) -> None:
    """Three fp32 tensors per parameter: 12 bytes for each element of the model, once over all ranks."""
    saved = source("zero1-bf16", NATIVE, 4)
    view = UniversalView.of(open_checkpoint(saved.folder))
    elements = sum(_numel(view.logical_shape(name)) for name in view.parameters)
    target = Run("llama", tp=1, zero={"stage": stage}, precision="bf16", groups="decay")

    reports = [outcome.report for outcome in ranks(2).run(train, target, STEP, load=str(saved.folder))]

    assert sum(report.bytes_needed for report in reports) == 12 * elements
    for report in reports:
        assert report.bytes_read <= 1.05 * report.bytes_needed
        assert 0.4 * 12 * elements < report.bytes_needed < 0.6 * 12 * elements


def test_a_layout_that_nobody_knows_stays_on_its_ranks(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """As long as the tensor-parallel size stays: TP2·DP2 ZeRO-1, TP2·DP1 ZeRO-3, and back."""
    for place, (stage, world_size) in enumerate([(1, 4), (3, 2), (0, 2), (2, 4)]):
        run = Run("mlp", tp=2, zero={"stage": stage}, groups="decay", precision="bf16")
        load = str(tmp_path / str(place - 1)) if place else None
        ranks(world_size).run(train, run, STEP, load=load, save=str(tmp_path / str(place)))
        views = [shares_of(tmp_path / name) for name in ("0", str(place))]
        assert views[0].logical_shape("linear_in.weight") == (2, 33, 20)
        assert list(compare(*views)) == []

    whole = Run("mlp", zero={"stage": 1}, groups="decay", precision="bf16")
    with pytest.raises(RankError, match="no layout is known for 8 parameters"):
        ranks(2).run(train, whole, STEP, load=str(tmp_path / "0"))


def test_plain_torch_model_needs_no_spec(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """No Megatron-Core, no spec, nothing named: ZeRO-2 on 4 ranks, ZeRO-3 on 2, ZeRO-0 on 1, and back."""
    chain = [(2, 4), (3, 2), (0, 1), (1, 2), (2, 4)]
    for position, (stage, world_size) in enumerate(chain):
        run = Run("mlp", zero={"stage": stage}, groups="decay")
        load = str(tmp_path / str(position - 1)) if position else None
        ranks(world_size).run(train, run, STEP, load=load, save=str(tmp_path / str(position)))
        assert differences(tmp_path / "0", tmp_path / str(position)) == []


def shares_of(folder: Path) -> UniversalView:
    """All that each tensor-parallel rank holds, buffers too."""
    checkpoint = open_checkpoint(folder)
    names = {name: name for name in checkpoint.parameters}
    return UniversalView(checkpoint, names, dict.fromkeys(names, PerRank()), check_record=False)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product
