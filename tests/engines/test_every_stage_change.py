"""Each optimizer class and each direction of stage change, in real engines: the state re-saved by the target equals the source's
bit for bit, and training goes on along the same losses.

DeepSpeed's own universal checkpoints fail for stages 2→3, 3→2, 0→1, 1→0, 1→3 and 3→1, and its native load for any other
data-parallel size ("The checkpoint being loaded used a DP world size of …").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import LAST_STEP, STEP, Source, differences, shared_differences

from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train

BOUND = {"fp32": 2e-5, "bf16": 3e-2, "fp16": 1e-2}
"""Largest accepted difference of a loss near 3.9 after a change of topology, where sums run in another order. Measured on this
model: 2e-7 in fp32, 4e-3 in bf16, 1e-3 in fp16."""

GRAD_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}

SOURCES = {
    "plain-fp32": (Run("llama", tp=2, zero={"stage": 0}, precision="fp32"), 4, "plain"),
    "unfused-bf16": (Run("llama", tp=2, zero={"stage": 0}, precision="bf16"), 2, "fp16-unfused"),
    "fused-bf16": (Run("llama", tp=2, zero={"stage": 0}, precision="bf16", fused=True), 4, "fp16-fused"),
    "zero1-bf16": (Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay"), 4, "zero-1/2"),
    "zero2-fp32": (Run("llama", tp=1, zero={"stage": 2, "round_robin_gradients": True}), 4, "zero-1/2"),
    "zero3-bf16": (Run("llama", tp=2, zero={"stage": 3, "sub_group_size": 2000}, precision="bf16"), 4, "zero-3"),
    "zero3-fp32": (Run("llama", tp=4, zero={"stage": 3}), 4, "zero-3"),
    "bf16-optimizer": (Run("llama", tp=2, zero={"stage": 1}, precision="bf16", config=GRAD_FP32), 4, "bf16-optimizer"),
    "zero1-fp16": (Run("llama", tp=2, zero={"stage": 1}, precision="fp16"), 4, "zero-1/2"),
}

TARGETS = {
    "plain": (Run("llama", tp=1, zero={"stage": 0}), 1),
    "unfused": (Run("llama", tp=1, zero={"stage": 0}, precision="bf16"), 2),
    "fused": (Run("llama", tp=1, zero={"stage": 0}, precision="bf16", fused=True), 2),
    "zero1": (Run("llama", tp=4, zero={"stage": 1}), 4),
    "zero2": (Run("llama", tp=2, zero={"stage": 2, "round_robin_gradients": True}, precision="bf16"), 4),
    "zero3": (Run("llama", tp=2, zero={"stage": 3, "sub_group_size": 3000}), 2),
    "zero3-wide": (Run("llama", tp=1, zero={"stage": 3}, precision="bf16"), 4),
    "bf16-optimizer": (Run("llama", tp=1, zero={"stage": 1}, precision="bf16", config=GRAD_FP32), 4),
}

GetSource = Callable[[str, Run, int], Source]


def with_precision(run: Run, precision: str, groups: str) -> Run:
    """The target as the source's precision and parameter groups ask for; fp32 gradient accumulation exists for bf16 only."""
    config = {} if precision != "bf16" else run.config
    return replace(run, precision=precision, config=config, groups=groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("origin", SOURCES)
def test_state_is_bit_exact_and_training_goes_on(
    origin: str, target: str, source: GetSource, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """DeepSpeed's universal load fails between ZeRO-3 and other stages, and to and from stage 0 (AssertionError, TypeError)."""
    run, world_size, form = SOURCES[origin]
    saved = source(origin, run, world_size)
    wanted, target_world = TARGETS[target]
    wanted = with_precision(wanted, run.precision, run.groups)

    outcome = ranks(target_world).run(
        train,
        wanted,
        LAST_STEP,
        load=str(saved.folder),
        save=str(tmp_path),
        save_tag="again",
        options={},
        save_first=True,
    )

    tag = f"global_step{STEP}"
    compared = shared_differences if run.fused != wanted.fused else differences
    assert compared(saved.folder / tag, tmp_path / "again") == []
    assert outcome[0].report is None or outcome[0].report.source.startswith(f"deepspeed {form} ")
    gaps = [abs(outcome[0].losses[step] - saved.losses[step]) for step in range(STEP + 1, LAST_STEP + 1)]
    assert max(gaps) <= BOUND[run.precision], (gaps, outcome[0].losses, saved.losses)


@pytest.mark.nccl_like("only")
@pytest.mark.parametrize(
    ("origin", "target"),
    [
        ("plain-fp32", "zero3"),
        ("unfused-bf16", "zero1"),
        ("fused-bf16", "zero3-wide"),
        ("zero1-bf16", "zero2"),
        ("zero2-fp32", "plain"),
        ("zero3-bf16", "fused"),
        ("zero3-fp32", "zero1"),
        ("bf16-optimizer", "zero3"),
    ],
)
def test_on_a_device(
    origin: str, target: str, source: GetSource, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """Each kind of source and of target once on the stand-in device."""
    test_state_is_bit_exact_and_training_goes_on(origin, target, source, ranks, tmp_path)


@pytest.mark.nccl_like
@pytest.mark.parametrize("origin", SOURCES)
def test_same_topology_continues_bit_for_bit(origin: str, source: GetSource, ranks: Callable[[int], RankPool]) -> None:
    """The universal path, forced, gives the very losses of the uninterrupted run."""
    run, world_size, _ = SOURCES[origin]
    saved = source(origin, run, world_size)
    always = replace(run, universal={"enabled": True, "load": "always"})
    outcome = ranks(world_size).run(train, always, LAST_STEP, load=str(saved.folder))
    for rank, found in enumerate(outcome):
        assert found.report is not None
        expected = {step: loss for step, loss in saved.outcomes[rank].losses.items() if step > STEP}
        assert found.losses == expected
        assert found.rates == saved.outcomes[rank].rates
        assert found.counters == saved.outcomes[rank].counters


@pytest.mark.parametrize("origin", SOURCES)
def test_same_topology_is_left_to_deepspeed(origin: str, source: GetSource, ranks: Callable[[int], RankPool]) -> None:
    run, world_size, _ = SOURCES[origin]
    saved = source(origin, run, world_size)
    outcome = ranks(world_size).run(train, run, STEP, load=str(saved.folder))
    assert all(found.report is None for found in outcome)
