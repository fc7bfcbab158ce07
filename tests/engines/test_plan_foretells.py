"""``ucp plan --model`` foretells a load: it says possible exactly when the load succeeds, with the same names and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import odd_optimizers
import pytest
from checkpoints import STEP

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.targeting import plan_target

Ranks = Callable[[int], RankPool]

MLP, LLAMA = Run("mlp", zero={"stage": 1}), Run("llama", zero={"stage": 1})
BIAS = ("linear_in.bias",)
ADAPTER = {"size": {"adapter": True}}
IDLE = {"size": {"adapter": True, "idle": True}}


@dataclass(frozen=True)
class Case:
    """A run that saved, and one that is to go on from it.

    Attributes:
        saved, target: changes to ``run``.
        policies: every one of them is tried with the pair.
        steps: of the target before it saves what its model is.
    """

    name: str
    run: Run = MLP
    saved: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int] = (2, 2)
    policies: tuple[Mapping[str, str], ...] = ({}, {"on_missing": "init", "on_extra": "drop"})
    steps: int = 0


INIT, DROP, RESET = {"on_missing": "init"}, {"on_extra": "drop"}, {"optimizer_states": "reset"}
DIFFERING = ({}, *({"on_differing": how} for how in ("first", "mean", "max")), RESET)

CASES = [
    Case("unchanged", policies=({}, RESET)),
    *(Case(f"zero-{stage} on other ranks", target={"zero": {"stage": stage}}, ranks=(2, 1)) for stage in (0, 1, 3)),
    Case("unfrozen", saved={"frozen": BIAS}, policies=({}, INIT, DROP, RESET)),
    Case("frozen", target={"frozen": BIAS}, policies=({}, INIT, DROP, RESET)),
    Case("a part more", target=ADAPTER, policies=({}, INIT, {**INIT, **RESET})),
    Case("a part fewer", saved=ADAPTER, target={"zero": {"stage": 3}}, policies=({}, DROP)),
    Case("never stepped", saved=IDLE | {"zero": {"stage": 0}}, target=IDLE, policies=({}, INIT, RESET)),
    Case("never stepped without ZeRO", saved=IDLE | {"zero": {"stage": 0}}, target=IDLE | {"zero": {"stage": 0}}),
    Case("more rows", target={"size": {"vocabulary": 53}}, policies=({}, INIT, DROP)),
    Case("fewer rows", target={"size": {"vocabulary": 40}}),
    Case("another width", target={"size": {"hidden": 24}}),
    Case("groups joined", saved={"groups": "decay"}, policies=({}, {"on_differing": "first"}, RESET)),
    Case("groups divided", target={"groups": "decay"}),
    Case("half precision", target={"precision": "bf16"}),
    Case("another optimizer", target={"optimizer": ("SGD", {"lr": 1e-3, "momentum": 0.9})}, steps=1),
    Case("an optimizer that keeps less", target={"optimizer": ("RMSprop", {"lr": 1e-3})}, steps=1),
    *(
        Case(
            f"numbers that differ, {kind.__name__}",
            saved={"optimizer": (kind, {}), "groups": "decay"},
            target={"optimizer": (kind, {}), "groups": "decay"},
            ranks=ranks,
            policies=DIFFERING,
        )
        for kind, ranks in ((odd_optimizers.NormPerTensor, (2, 1)), (odd_optimizers.Prodigy, (2, 2)))
    ),
    Case("nothing in common", Run("gpt", zero={"stage": 1}), target={"model": "mlp"}),
    Case("states that aren't element-wise", saved={"optimizer": ("Adafactor", {"lr": 1e-3}), "zero": {"stage": 0}}),
    Case("tensor-parallel", LLAMA, {"tp": 2}, {"tp": 1, "zero": {"stage": 2}}),
    Case("cut more finely", LLAMA, {"tp": 1}, {"tp": 2, "zero": {"stage": 3}}, (1, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_foretells_the_load(case: Case, ranks: Ranks, tmp_path: Path) -> None:
    source, model = (replace(case.run, **changes) for changes in (case.saved, case.target))
    ranks(case.ranks[0]).run(train, source, STEP, save=str(tmp_path / "source"))
    ranks(case.ranks[1]).run(train, replace(model, seed=3), case.steps, save=str(tmp_path / "model"))
    topology = Topology(model.tp, 1, case.ranks[1] // model.tp, model.zero["stage"])
    for policies in case.policies:
        plan = plan_target(
            open_checkpoint(tmp_path / "source"),
            topology,
            model=open_checkpoint(tmp_path / "model"),
            policies=Policies(
                policies.get("on_missing") == "init",
                policies.get("on_extra") == "drop",
                policies.get("optimizer_states", "restore"),  # type: ignore[arg-type]
                differing=policies.get("on_differing", "error"),  # type: ignore[arg-type]
            ),
        )
        target = replace(model, seed=3, universal={"enabled": True, "load": "always", **policies})
        try:
            outcomes = ranks(case.ranks[1]).run(train, target, STEP, load=str(tmp_path / "source"))
        except RankError as error:
            assert isinstance(error.original, UniversalCheckpointError), error
            assert not plan.possible, (policies, str(error.original))
            continue
        assert plan.possible, (policies, [str(obstacle) for obstacle in plan.obstacles])
        reports = [outcome.report for outcome in outcomes]
        for found, lists in ((plan.initialised, "initialised"), (plan.dropped, "dropped")):
            assert set(found) == {name for report in reports for name in getattr(report, lists)}, (policies, lists)
        held = [(rank.data_parallel_rank, rank.model_parallel_rank, rank.bytes_read) for rank in plan.ranks]
        assert [number for *_, number in sorted(held)] == [report.bytes_read for report in reports], policies
