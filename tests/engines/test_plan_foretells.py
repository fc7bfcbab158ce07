"""``ucp plan --model`` foretells a load: it says possible exactly when the load succeeds, with the same names and bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import odd_optimizers
import pytest
import torch
from checkpoints import STEP
from test_wrapped_names import wrapped
from torch import nn

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, start_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.targeting import plan_target

Ranks = Callable[[int], RankPool]

MLP, LLAMA = Run("mlp", zero={"stage": 1}), Run("llama", zero={"stage": 1})
BIAS = ("linear_in.bias",)
ADAPTER = {"size": {"adapter": True}}
IDLE = {"size": {"adapter": True, "idle": True}}


class Tied(nn.Module):
    """An embedding and a head, which begin with the same values, tied or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        words, head = nn.Embedding(48, 6), nn.Linear(6, 48, bias=False)
        head.weight = nn.Parameter(words.weight.detach().clone()) if how == "apart" else words.weight
        for name in ("head", "words") if how == "head first" else ("words", "head"):
            self.add_module(name, {"words": words, "head": head}[name])
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(self.words(tokens))).flatten(0, 1), labels.flatten())


class Listing(torch.optim.lr_scheduler.LambdaLR):
    """A scheduler that keeps a value for each group under a name of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.favourites = [len(group["params"]) for group in optimizer.param_groups]


@dataclass(frozen=True)
class Built:
    """A run of a model that `Run` doesn't know.

    Attributes:
        kind: ``tied``, or ``wrapped`` (see `wrapped`).
        how: which one of that kind.
        listing: whether the engine has a `Listing` for a scheduler.
    """

    kind: str = ""
    how: str = ""
    listing: bool = False


def go_on(run: Run, built: Built, steps: int, load: str | None = None, save: str | None = None) -> Any:
    """Do as `train`; returns the report of the load."""
    if built == Built():
        return train(run, steps, load=load, save=save).report
    reset_parallel_state()
    engine = start_engine(run, Tied(built.how) if built.kind == "tied" else wrapped(built.how, run.seed))
    if built.listing:
        engine.lr_scheduler = Listing(engine.optimizer.optimizer)
    if load is not None:
        engine.load_checkpoint(load)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    if save is not None:
        engine.save_checkpoint(save)
    report = getattr(engine, "universal_checkpoint_report", None)
    engine.destroy()
    del engine
    gc.collect()
    return report


@dataclass(frozen=True)
class Case:
    """A run that saved, and one that is to go on from it.

    Attributes:
        saved, target: changes to ``run``.
        ranks: of each of them.
        policies: every one of them is tried with the pair.
        steps: of the target before it saves what its model is.
        trained: steps of the run that saved.
        models: what each of them builds.
        converted: whether the checkpoint becomes a universal one first.
    """

    name: str
    run: Run = MLP
    saved: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, int] = (2, 2)
    policies: tuple[Mapping[str, Any], ...] = ({}, {"on_missing": "init", "on_extra": "drop"})
    steps: int = 0
    trained: int = STEP
    models: tuple[Built, Built] = (Built(), Built())
    converted: bool = False

    def topology(self, run: Run) -> Topology:
        """Return the target's."""
        tp, pp = run.tp, run.pp or 1
        ep = run.config.get("expert_parallel", {}).get("autoep_size", 1)
        return Topology(tp, pp, self.ranks[1] // (tp * pp), run.zero["stage"], max(ep, *run.size.get("ep", (1,)), 1))


def tied(how: str) -> Built:
    return Built("tied", how)


def compiled(how: str, listing: bool = False) -> Built:
    return Built("wrapped", how, listing)


PIPELINE = Run("tied", pp=2, config={"gradient_clipping": 0.0})
MOE = Run("moe", size={"ep": (2, 2)})
MIXTRAL = Run("huggingface", {"family": "mixtral"})
GROWN = {"vocabulary": 50, "vocabulary_multiple": 4}

INIT, DROP, RESET = {"on_missing": "init"}, {"on_extra": "drop"}, {"optimizer_states": "reset"}
KEEP = {"hyperparameters": "keep"}
FIRST_MOMENTUM = (odd_optimizers.MomentumOfGroups, {"momenta": (0.9, 0.0)})
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
    Case("groups joined that keep their settings", saved={"groups": "decay"}, policies=({}, KEEP, {**KEEP, **RESET})),
    Case("groups divided", target={"groups": "decay"}),
    Case("half precision", target={"precision": "bf16"}),
    Case("another optimizer", target={"optimizer": ("SGD", {"lr": 1e-3, "momentum": 0.9})}, steps=1),
    Case(
        "an optimizer that keeps nothing",
        target={"optimizer": ("SGD", {"lr": 1e-3})},
        policies=({}, DROP, RESET),
        steps=1,
    ),
    Case("an optimizer that keeps less", target={"optimizer": ("RMSprop", {"lr": 1e-3})}, steps=1),
    *(
        Case(
            f"groups of which {which} keeps a momentum",
            saved={"optimizer": saved, "groups": "decay"},
            target={"optimizer": target, "groups": "decay"},
            policies=({}, KEEP, {**KEEP, **INIT}, {**KEEP, **DROP}, {**KEEP, **INIT, **DROP}),
            steps=1,
        )
        for which, saved, target in (
            ("another one", FIRST_MOMENTUM, (odd_optimizers.MomentumOfGroups, {"momenta": (0.0, 0.9)})),
            ("one, as all did,", ("SGD", {"lr": 1e-3, "momentum": 0.9}), FIRST_MOMENTUM),
            ("one, after AdamW,", ("AdamW", {"lr": 1e-3}), FIRST_MOMENTUM),
        )
    ),
    *(
        Case(
            f"states that a setting decides, {name} {saved} and {target}",
            saved={"optimizer": (name, {"lr": 1e-3, **saved})},
            target={"optimizer": (name, {"lr": 1e-3, **target})},
            policies=({}, INIT, DROP, KEEP, {**KEEP, **INIT}),
            steps=1,
        )
        for name, saved, target in (
            ("AdamW", {}, {"amsgrad": True}),
            ("AdamW", {"amsgrad": True}, {}),
            ("RMSprop", {}, {"centered": True, "momentum": 0.9}),
            ("SGD", {"momentum": 0.9}, {}),
            ("SGD", {}, {"momentum": 0.9}),
        )
    ),
    Case("a state that doesn't begin at zero", target={"optimizer": ("Adamax", {"lr": 1e-3})}, steps=1),
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
    Case(
        "more rows on tensor-parallel ranks",
        LLAMA,
        {"tp": 2, "size": {**GROWN, "vocabulary": 47}, "universal": {"enabled": True, "vocabulary_size": 47}},
        {"tp": 1, "size": GROWN},
        policies=({"vocabulary_size": 50}, {"vocabulary_size": 50, **INIT}, {"vocabulary_size": 50, **DROP}),
    ),
    *(
        Case(
            f"a vocabulary padded to {rows}",
            replace(LLAMA, universal={"enabled": True, "vocabulary_size": 50}),
            {"tp": 2, "size": {**GROWN, "vocabulary_multiple": 16}},
            {"tp": 1, "size": {**GROWN, "vocabulary_multiple": rows}, "zero": {"stage": 2}},
            policies=({}, {"vocabulary_size": 50}),
        )
        for rows in (64, 56, 80)
    ),
    *(Case(f"from two stages to {pp}", PIPELINE, target={"pp": pp}, ranks=(2, pp)) for pp in (1, 2)),
    Case("two stages of two ranks", PIPELINE, target={"zero": {"stage": 0}}, ranks=(2, 4), policies=({}, RESET)),
    Case("from one stage to two", PIPELINE, {"pp": 1}, ranks=(1, 2), policies=({},)),
    Case("a pipeline as a plain model", replace(LLAMA, size={"layers": 2}), {"pp": 2}, policies=({},)),
    Case("a pipeline of another model", PIPELINE, target={"model": "mlp", "pp": None}, ranks=(2, 1)),
    Case("experts on fewer ranks each", MOE, target={"size": {"ep": (1, 1)}, "zero": {"stage": 2}}),
    Case("experts on more ranks", MOE, {"size": {"ep": (1, 1)}}, {"zero": {"stage": 0}}),
    Case("groups of experts", MOE, {"groups": "decay"}, {"size": {"ep": (1, 1)}}, policies=({}, RESET)),
    Case(
        "AutoEP on fewer ranks each",
        MIXTRAL,
        {"config": {"expert_parallel": {"enabled": True, "autoep_size": 2}}},
        {"config": {"expert_parallel": {"enabled": True, "autoep_size": 1}}, "zero": {"stage": 2}},
        policies=({},),
    ),
    Case(
        "experts become AutoEP's",
        MIXTRAL,
        {},
        {"config": {"expert_parallel": {"enabled": True, "autoep_size": 2}}},
        (1, 2),
        ({},),
    ),
    Case(
        "AutoEP's experts become the model's own",
        MIXTRAL,
        {"config": {"expert_parallel": {"enabled": True, "autoep_size": 2}}},
        {},
        (2, 1),
    ),
    Case("other experts", MOE, target={"size": {"ep": (2, 2), "experts": (2, 2)}}),
    Case("universal, cut more finely", LLAMA, {}, {"tp": 2}, (1, 2), converted=True),
    Case("universal, with a part more", saved={"frozen": BIAS}, target=ADAPTER, policies=({}, INIT), converted=True),
    Case("universal, from a pipeline", PIPELINE, {}, {"pp": 1}, (2, 1), converted=True),
    *(
        Case(f"{saved}, then {target}", models=(compiled(saved), compiled(target)))
        for saved, target in (("plain", "compiled"), ("data parallel", "plain"), ("plain", "adapted"))
    ),
    Case("untied", models=(tied("tied"), tied("apart"))),
    Case("tied otherwise", models=(tied("tied"), tied("head first"))),
    Case("tied where values are equal", models=(tied("apart"), tied("tied")), trained=0),
    Case("a scheduler's groups", saved={"groups": "decay"}, models=(compiled("plain", True), compiled("plain", True))),
    Case(
        "a scheduler's groups in another order",
        saved={"groups": "decay"},
        target={"groups": "shuffled"},
        models=(compiled("plain", True), compiled("plain", True)),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_foretells_the_load(case: Case, ranks: Ranks, tmp_path: Path) -> None:
    source, model = (replace(case.run, **changes) for changes in (case.saved, case.target))
    model = replace(model, seed=3)
    ranks(case.ranks[0]).run(go_on, source, case.models[0], case.trained, save=str(tmp_path / "source"))
    if case.converted:
        convert(UniversalView.of(open_checkpoint(tmp_path / "source")), tmp_path / "u" / "step")
        (tmp_path / "source").rename(tmp_path / "native")
        (tmp_path / "u").rename(tmp_path / "source")
        (tmp_path / "source" / "latest").write_text("step")
    ranks(case.ranks[1]).run(go_on, model, case.models[1], case.steps, save=str(tmp_path / "model"))
    for policies in case.policies:
        plan = plan_target(
            open_checkpoint(tmp_path / "source"),
            case.topology(model),
            vocabulary_size=policies.get("vocabulary_size"),
            model=open_checkpoint(tmp_path / "model"),
            policies=Policies(
                policies.get("on_missing") == "init",
                policies.get("on_extra") == "drop",
                policies.get("optimizer_states", "restore"),
                differing=policies.get("on_differing", "error"),
                keep_settings=policies.get("hyperparameters") == "keep",
            ),
        )
        target = replace(model, universal={"enabled": True, "load": "always", **policies})
        try:
            loading = go_on, target, case.models[1], case.trained
            reports = ranks(case.ranks[1]).run(*loading, load=str(tmp_path / "source"))
        except RankError as error:
            assert isinstance(error.original, UniversalCheckpointError), error
            assert not plan.possible, (policies, str(error.original))
            continue
        assert plan.possible, (policies, [str(obstacle) for obstacle in plan.obstacles])
        for lists in ("restored", "initialised", "dropped"):
            assert set(getattr(plan, lists)) == {name for report in reports for name in getattr(report, lists)}, (
                policies,
                lists,
            )
        places = [divmod(rank.model_parallel_rank, model.tp) for rank in plan.ranks]
        read = sorted(
            (stage, rank.data_parallel_rank, tensor_parallel, rank.bytes_read)
            for (stage, tensor_parallel), rank in zip(places, plan.ranks, strict=True)
        )
        assert [numbytes for *_, numbytes in read] == [report.bytes_read for report in reports], policies
