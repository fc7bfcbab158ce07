"""``ucp convert --to deepspeed-universal``: engines without this package go on from the folder, on other topologies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsdp_runs
import pytest
from checkpoints import differences, shared_differences
from click.testing import CliRunner

from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.megatron_deepspeed import universal_checkpoint_info
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, train

Ranks = Callable[[int], RankPool]

STEP = 2
BLOCK = {"enabled": True}
UNLOADED = {"calibration", "calls"}
"""Names of buffers, which DeepSpeed's own universal load leaves as the model has them."""


def stock(run: Run) -> Run:
    """Return a run of DeepSpeed alone that loads such folders, of other initial weights."""
    return replace(run, seed=5, universal=None, config={**run.config, "checkpoint": {"load_universal": True}})


def converted(source: Path, destination: Path, to: str = "deepspeed-universal") -> Path:
    """Run the command."""
    done = CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", to, "--quiet"])
    assert done.exit_code == 0, done.output
    return destination


@dataclass(frozen=True)
class Case:
    """A run that saves, on so many ranks, and others that go on from it, each with its number of ranks."""

    source: Run
    ranks: int
    targets: dict[str, tuple[Run, int]]
    saved: dict[str, Any] = field(default_factory=dict)


def autotp(stage: int, tp: int) -> Run:
    return Run("huggingface", {"family": "llama"}, tp=tp, zero={"stage": stage}, universal=BLOCK)


def megatron(tp: int, stage: int) -> Run:
    return Run("megatron-deepspeed-llama", {"layers": 1}, tp=tp, zero={"stage": stage}, universal=None)


def experts(ep: int, stage: int) -> Run:
    config = {"expert_parallel": {"enabled": True, "autoep_size": ep}}
    return Run("huggingface", {"family": "mixtral"}, zero={"stage": stage}, config=config)


def mlp(stage: int, **changes: Any) -> Run:
    return Run("mlp", zero={"stage": stage}, **changes)


PIPELINE = Run("llama", pp=2, zero={"stage": 1}, precision="bf16", universal=BLOCK)
INFO = {"universal_checkpoint_info": universal_checkpoint_info(VOCABULARY, True, False)}
BF16, FP16 = {"precision": "bf16"}, {"precision": "fp16", "fused": True}

CASES = {
    "zero-1": Case(mlp(1, **BF16), 2, {"zero-3": (mlp(3, **BF16), 2), "zero-2": (mlp(2, **BF16), 1)}),
    "zero-3": Case(mlp(3, **FP16), 2, {"zero-1": (mlp(1, **FP16), 1), "zero-3": (mlp(3, **FP16), 1)}),
    "groups": Case(mlp(0, groups="decay"), 1, {"zero-2": (mlp(2, groups="decay"), 2)}),
    "autotp": Case(autotp(1, 2), 2, {"one": (autotp(1, 1), 2), "zero-3": (autotp(3, 2), 2)}),
    "autotp-zero-3": Case(autotp(3, 1), 2, {"two": (autotp(1, 2), 2)}),
    "megatron-deepspeed": Case(megatron(2, 1), 2, {"one": (megatron(1, 2), 2)}, INFO),
    "megatron-deepspeed-padded": Case(megatron(1, 2), 1, {"two": (megatron(2, 1), 2)}, INFO),
    "autoep": Case(experts(2, 1), 2, {"one": (experts(1, 2), 2)}),
    "autoep-one": Case(experts(1, 1), 1, {"two": (experts(2, 1), 2)}),
    "pipeline": Case(PIPELINE, 2, {"one": (replace(PIPELINE, pp=1), 1), "two": (PIPELINE, 2)}),
}


@pytest.mark.parametrize("name", CASES)
def test_stock_engines_resume_from_it(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Masters, states, steps, groups, schedule, counters and loss scale: all that a save of the engine then holds."""
    case, first = CASES[name], tmp_path / "a"
    outcomes = ranks(case.ranks).run(train, case.source, STEP, save=str(first), client_state={"epoch": 3, **case.saved})
    folder = converted(first, tmp_path / "u")
    assert differences(first, folder) == []
    for other, (run, count) in case.targets.items():
        found = ranks(count).run(train, stock(run), STEP, load=str(folder), save=str(tmp_path / other))
        assert found[0].report is None and found[0].client_state["epoch"] == 3
        assert (found[0].counters, found[0].rates) == (outcomes[0].counters, outcomes[0].rates)
        lines = differences(first, tmp_path / other)
        assert {line.split()[0] for line in lines} <= UNLOADED, (other, lines)


def test_a_run_of_fsdp_goes_on_in_a_stock_engine(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(fsdp_runs.save, str(tmp_path / "dcp"), "nested", "fsdp", "AdamW")
    folder = converted(tmp_path / "dcp", tmp_path / "u")
    run = Run("mlp", zero={"stage": 1}, groups="decay", config={"scheduler": {}})
    ranks(1).run(train, stock(run), fsdp_runs.STEPS, load=str(folder), save=str(tmp_path / "b"))
    lines = shared_differences(tmp_path / "dcp", tmp_path / "b")  # DCP doesn't count samples, the engine does
    assert {line.split()[0] for line in lines} <= {*UNLOADED, "global_samples"}, lines
