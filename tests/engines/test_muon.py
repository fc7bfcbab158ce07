"""DeepSpeed's Muon: its momentum, wherever a stage keeps it, and the states of its auxiliary Adam.

ZeRO-1 and 2 keep on each rank the momentum of whole matrices, also of those cut between two ranks; offloaded and under ZeRO-3 it
is cut like the weights. DeepSpeed's universal checkpoints know ``exp_avg`` and ``exp_avg_sq`` only (``ds_to_universal.py:154``,
KeyError; issue #8608).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import LAST_STEP, STEP, Source, differences, shared_differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Outcome, Run, build_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]
Sources = Callable[[str, Run, int], Source]

MUON = {"lr": 0.02, "adam_lr": 2e-3, "momentum": 0.9, "weight_decay": 0.01}
MATRICES = {"linear_in.weight", "linear_out.weight"}
"""The parameters that Muon steps on: ``linear_out.weight`` comes first and is cut between the ranks of the source."""


def muon_run(stage: int, *, zero: Any = None, params: Any = None, **changes: Any) -> Run:
    """A run at a stage, with further settings of ``zero_optimization`` and of the optimizer."""
    stage_3 = {"reduce_scatter": False} if stage == 3 else {}
    optimizer = {"type": "Muon", "params": {**MUON, "torch_adam": True, **(params or {})}}
    config = {"optimizer": optimizer, "scheduler": {}, **changes.pop("config", {})}
    return Run("mlp", zero={"stage": stage, **stage_3, **(zero or {})}, config=config, **changes)


def fresh(ranks: Ranks, world_size: int) -> RankPool:
    """Ranks that have trained nothing yet: DeepSpeed compiles Muon's step, and what torch compiles for a shape depends, to the
    last digit, on the shapes that a process has seen before."""
    pool = ranks(world_size)
    pool.close()
    return pool


@pytest.fixture
def fp32(source: Sources, ranks: Ranks) -> Source:
    """ZeRO-1 on two ranks."""
    fresh(ranks, 2)
    return source("muon_fp32", muon_run(1), 2)


@pytest.fixture
def bf16(source: Sources, ranks: Ranks) -> Source:
    """ZeRO-2 on two ranks, whose momentum is in bf16 as the gradients are."""
    fresh(ranks, 2)
    return source("muon_bf16", muon_run(2, precision="bf16"), 2)


def resumed(ranks: Ranks, world_size: int, run: Run, load: Path, save: Path) -> Outcome:
    """Load, save at once, and go on."""
    pool = fresh(ranks, world_size)
    return pool.run(train, run, LAST_STEP, load=str(load), save=str(save), save_first=True)[0]  # type: ignore[no-any-return]


def gap(source: Source, outcome: Outcome) -> float:
    """Largest difference of the losses after the resume."""
    return max(abs(source.losses[step] - outcome.losses[step]) for step in range(STEP + 1, LAST_STEP + 1))


def test_from_stage_to_stage_and_through_a_conversion(fp32: Source, ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-1 → 3 → universal → 2 → 1 → no ZeRO: KeyError in ``ds_to_universal``, and across stages nothing loads at all."""
    found = open_checkpoint(fp32.folder).parameters
    assert {name for name, entry in found.items() if "momentum_buffer" in entry.states} == MATRICES
    assert found["norm.weight"].states.keys() == {"fp32", "exp_avg", "exp_avg_sq"}

    outcome = resumed(ranks, 4, muon_run(3), fp32.folder, tmp_path / "3")
    assert differences(fp32.folder, tmp_path / "3") == [] and gap(fp32, outcome) < 2e-5
    convert(UniversalView.of(open_checkpoint(tmp_path / "3")), tmp_path / "u")
    assert differences(fp32.folder, tmp_path / "u") == []
    round_robin = muon_run(2, zero={"round_robin_gradients": True})
    outcome = resumed(ranks, 4, round_robin, tmp_path / "u", tmp_path / "2")
    assert differences(fp32.folder, tmp_path / "2") == [] and gap(fp32, outcome) < 2e-5
    outcome = resumed(ranks, 2, fp32.run, tmp_path / "2", tmp_path / "1")
    assert differences(fp32.folder, tmp_path / "1") == [] and outcome.losses[LAST_STEP] == fp32.losses[LAST_STEP]
    resumed(ranks, 2, muon_run(0), tmp_path / "1", tmp_path / "0")  # which clips gradients, and the others updates
    assert differences(fp32.folder, tmp_path / "0") == []


def test_momentum_in_the_gradients_type(bf16: Source, ranks: Ranks, tmp_path: Path) -> None:
    """bf16 through fp32 and back: ZeRO-2 → offload → ZeRO-3 → fp32 accumulation → ZeRO-2, with not a bit lost."""
    hops = {
        "offload": muon_run(2, precision="bf16", zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
        "3": muon_run(3, precision="bf16"),
        "accumulated": muon_run(1, precision="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}),
        "2": bf16.run,
    }
    folder = bf16.folder
    for name, run in hops.items():
        outcome = resumed(ranks, 4, run, folder, tmp_path / name)
        folder = tmp_path / name
        assert outcome.report is not None
        assert gap(bf16, outcome) < 2e-3 or name == "accumulated"  # which clips gradients, and the others updates
        dtypes = [line for line in differences(bf16.folder, folder) if not line.endswith("BF16 in A, F32 in B")]
        assert dtypes == []
    assert differences(bf16.folder, tmp_path / "2") == differences(bf16.folder, tmp_path / "3") == []


def test_an_offload_alone_is_no_reason_to_leave_the_load_to_deepspeed(
    fp32: Source, ranks: Ranks, tmp_path: Path
) -> None:
    """Same topology: DeepSpeed's own load takes the momentum's other length for none, and begins at zero without a word."""
    offloaded = muon_run(1, zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}})
    outcome = resumed(ranks, 2, offloaded, fp32.folder, tmp_path / "a")
    assert outcome.report is not None and differences(fp32.folder, tmp_path / "a") == [] and gap(fp32, outcome) < 2e-5
    outcome = resumed(ranks, 2, fp32.run, tmp_path / "a", tmp_path / "b")
    assert outcome.report is not None and differences(fp32.folder, tmp_path / "b") == []
    assert outcome.losses[LAST_STEP] == fp32.losses[LAST_STEP]


def resume_late(run: Run, load: str) -> dict[int, float]:
    """On a rank: load into an engine that has trained, and go on; losses after the load, by step."""
    engine = build_engine(run)
    for step in (1, 2):
        train_step(engine, run, step)
    engine.load_checkpoint(load)
    losses = {step: train_step(engine, run, step) for step in range(STEP + 1, LAST_STEP + 1)}
    engine.destroy()
    return losses


def test_a_momentum_that_deepspeed_holds_twice(fp32: Source, ranks: Ranks, tmp_path: Path) -> None:
    """``save_muon_momentum_buffer_in_memory``: DeepSpeed's own load fills the copy that isn't used and goes on with the other."""
    run = muon_run(3, zero={"save_muon_momentum_buffer_in_memory": True})
    losses = ranks(2).run(resume_late, run, str(fp32.folder))[0]
    assert max(abs(losses[step] - fp32.losses[step]) for step in losses) < 2e-5
    reset = {"enabled": True, "optimizer_states": "reset"}
    losses = ranks(2).run(resume_late, replace(run, universal=reset), str(fp32.folder))[0]
    fresh = resumed(ranks, 2, replace(fp32.run, universal=reset), fp32.folder, tmp_path)
    assert max(abs(losses[step] - fresh.losses[step]) for step in losses) < 2e-5 and gap(fp32, fresh) > 1e-4


def test_an_auxiliary_adam_of_another_class(fp32: Source, ranks: Ranks, tmp_path: Path) -> None:
    """torch's AdamW → FusedAdam, which counts its steps in a number, and which no copy may try out."""
    fused = muon_run(2, params={"torch_adam": False})
    outcome = resumed(ranks, 4, fused, fp32.folder, tmp_path / "a")
    assert shared_differences(fp32.folder, tmp_path / "a") == [] and gap(fp32, outcome) < 2e-5
    outcome = resumed(ranks, 2, fp32.run, tmp_path / "a", tmp_path / "b")
    assert shared_differences(fp32.folder, tmp_path / "b") == [] and gap(fp32, outcome) < 2e-5


def test_what_an_elastic_checkpoint_truncates_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """``elastic_checkpoint`` cuts padding off the momentum of whole matrices, which has none."""
    ranks(2).run(train, muon_run(1, zero={"elastic_checkpoint": True}), 2, save=str(tmp_path))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, muon_run(3), STEP, load=str(tmp_path))
    assert isinstance(caught.value.original, MismatchError)
    assert "linear_in.weight: optimizer state 'momentum_buffer' isn't element-wise" in str(caught.value.original)
