"""DeepSpeed's AutoEP on Hugging Face models: another expert-parallel size, data-parallel size and ZeRO stage, state bit for bit.

Experts given to the wrong rank keep every byte and ruin the model. So the oracle is a plain model without DeepSpeed that is given
the checkpoint's whole weights: it has to say the same about some tokens as the engines do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import differences, shared_differences
from click.testing import CliRunner
from safetensors.torch import load_file

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, UnsupportedError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.huggingface_models import EXPERT_FAMILIES, build_huggingface, causal_logits
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of, build_engine, train_step
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.targeting import plan_target

Ranks = Callable[[int], RankPool]

UNIVERSAL = {"enabled": True, "load": "always"}

STEPS = 2
"""Trained before the source is saved."""

BOUND = 1e-5
"""Largest accepted difference of logits of about 1 to 5, in float32: sums over ranks run in another order."""

RENAMED = (("router.gate", "gate"), ("router", "gate"))
"""Modules as AutoEP calls them, and as transformers does."""

QWEN = (("shared_experts", "shared_expert"), ("shared_experts_gate", "shared_expert_gate"))
"""The same of Qwen alone."""


def autoep(ep: int, stage: int, family: str = "mixtral", **changes: Any) -> Run:
    """A run of a family; loads are universal ones also where DeepSpeed could load by itself."""
    config = {"expert_parallel": {"enabled": True, "autoep_size": ep}, **changes.pop("config", {})}
    settings: dict[str, Any] = {"universal": UNIVERSAL, **changes}
    zero = {"stage": stage, **settings.pop("zero", {})}
    return Run("huggingface", {"family": family, **settings.pop("size", {})}, zero=zero, config=config, **settings)


def plain(stage: int, family: str = "mixtral", **size: Any) -> Run:
    """A run of the same model without AutoEP."""
    return Run("huggingface", {"family": family, **size}, zero={"stage": stage}, universal=UNIVERSAL)


def run_once(run: Run, steps: int, save: str, load: str | None = None) -> dict[str, Any]:
    """On a rank: build, load if asked to, train, save; returns what the engine says then, and the loss of the step after."""
    engine = build_engine(run)
    if load is not None:
        engine.load_checkpoint(load)
    for step in range(1, steps + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(save, tag="step")
    with torch.no_grad():
        logits = causal_logits(engine, batch_of(run, 100)[:, :-1])
    report = getattr(engine, "universal_checkpoint_report", None)
    loss = train_step(engine, run, STEPS + 1)
    engine.destroy()
    return {"logits": logits, "report": report, "loss": loss}


def logits_of_whole(run: Run, checkpoint: Path, folder: Path) -> torch.Tensor:
    """Return the logits of a plain model that is given the checkpoint's whole weights."""
    convert(UniversalView.of(open_checkpoint(checkpoint)), folder)
    atoms = {key: atom for path in folder.glob("atoms-*") for key, atom in load_file(path).items()}
    held = {key.rpartition("/")[0]: atom for key, atom in atoms.items() if key.endswith(("/fp32", "/weight"))}
    model = build_huggingface(**{"vocabulary": VOCABULARY, "seed": 1, **run.size})
    missing, unexpected = model.load_state_dict(plain_weights(held, run.size["family"]), strict=False)
    assert not missing and not unexpected
    with torch.no_grad():
        return causal_logits(model, batch_of(run, 100)[:, :-1])


def plain_weights(held: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Whole tensors of AutoEP's layers as those of transformers' modules."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        layer, _, weight = name.rpartition(".experts.")
        if weight == "w1":
            found[f"{layer}.experts.gate_up_proj"] = torch.cat([tensor, held[f"{layer}.experts.w3"]], dim=1)
        elif weight == "w2":
            found[f"{layer}.experts.down_proj"] = tensor
        elif weight != "w3":
            for renamed, plain in (*RENAMED, *(QWEN if family == "qwen2_moe" else ())):
                name = name.replace(f".mlp.{renamed}.", f".mlp.{plain}.")
            found[name] = tensor
    return found


CHAIN = ((4, 4), (1, 2), (2, 2), (1, 1), (2, 4))
"""Expert-parallel sizes, each with a number of ranks; the last is the source's."""


@pytest.mark.parametrize(
    ("stage", "stages", "settings"),
    [
        (0, (1, 3, 2, 0, 0), {}),
        (1, (3, 0, 3, 2, 1), {"precision": "bf16"}),
        (2, (2, 1, 0, 3, 2), {"groups": "decay"}),
        (3, (0, 2, 1, 1, 3), {}),
        (0, (2, 0, 1, 3, 0), {"precision": "bf16"}),
        (0, (0, 2, 1, 3, 0), {"precision": "bf16", "fused": True}),
    ],
)
def test_every_expert_parallel_size(
    stage: int, stages: tuple[int, ...], settings: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """From EP2 on four ranks to other sizes, numbers of ranks and stages, one after the other, and back to the first."""
    source = autoep(2, stage, **settings)
    expected = ranks(4).run(run_once, source, STEPS, str(tmp_path / "a"))[0]["loss"]
    opened = open_checkpoint(tmp_path / "a" / "step")
    assert (opened.topology.ep, opened.topology.dp) == (2, 4)
    before = tmp_path / "a"
    for number, ((ep, world), target) in enumerate(zip(CHAIN, stages, strict=True)):
        after = tmp_path / str(number)
        found = ranks(world).run(run_once, autoep(ep, target, **settings), 0, str(after), str(before))
        assert settings.get("precision") or abs(found[0]["loss"] - expected) < BOUND
        assert shared_differences(tmp_path / "a" / "step", after / "step") == []
        before = after


@pytest.mark.parametrize(
    ("family", "stages"),
    [*((family, (1, 3, 2)) for family in EXPERT_FAMILIES), ("mixtral", (3, 0, 1)), ("deepseek_v3", (0, 2, 3))],
)
def test_from_and_to_the_model_of_transformers(
    family: str, stages: tuple[int, int, int], ranks: Ranks, tmp_path: Path
) -> None:
    """Fused tensors of all experts on each rank, AutoEP's on two and four, fused ones again: the same state, the same logits."""
    source = plain(stages[0], family)
    first = ranks(2).run(run_once, source, STEPS, str(tmp_path / "0"))
    expected = logits_of_whole(source, tmp_path / "0" / "step", tmp_path / "whole-0")
    chain = [(autoep(2, stages[1], family), 2), (autoep(4, stages[2], family), 4), (source, 2)]
    found = list(first)
    for number, (run, world) in enumerate(chain, start=1):
        before, after = str(tmp_path / str(number - 1)), str(tmp_path / str(number))
        found += ranks(world).run(run_once, run, 0, after, before)
    assert differences(tmp_path / "0" / "step", tmp_path / "3" / "step") == []
    assert differences(tmp_path / "1" / "step", tmp_path / "2" / "step") == []
    oracle = logits_of_whole(source, tmp_path / "2" / "step", tmp_path / "whole-2")
    assert oracle.equal(expected)
    for rank in found:
        assert float((rank["logits"] - expected).abs().max()) <= BOUND


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 0), (0, 2)])
def test_experts_that_are_modules_of_their_own(first: int, second: int, ranks: Ranks, tmp_path: Path) -> None:
    """As transformers 4 has Mixtral's: to fused ones, to AutoEP's, and back."""
    source = plain(first, single=True)
    expected = ranks(2).run(run_once, source, STEPS, str(tmp_path / "0"))[0]["logits"]
    for number, run in enumerate((plain(second), autoep(2, second), source), start=1):
        before, after = str(tmp_path / str(number - 1)), str(tmp_path / str(number))
        for found in ranks(2).run(run_once, run, 0, after, before):
            assert float((found["logits"] - expected).abs().max()) <= BOUND
    assert differences(tmp_path / "0" / "step", tmp_path / "3" / "step") == []


EXPERT_WEIGHTS = tuple(f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))

SETTINGS: dict[str, dict[str, Any]] = {
    "zero-1": {"stage": 1},
    "data-first": {"stage": 1, "config": {"use_data_before_expert_parallelism": True}},
    "data-first-zero-3": {"stage": 3, "config": {"use_data_before_expert_parallelism": True}},
    "zero-2-round-robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "zero-3-sub-groups": {"stage": 3, "zero": {"sub_group_size": 1000}},
    "frozen-experts": {"stage": 2, "frozen": EXPERT_WEIGHTS},
    "frozen-experts-zero-0": {"stage": 0, "frozen": EXPERT_WEIGHTS},
    "frozen-router-zero-3": {"stage": 3, "frozen": ("model.layers.0.mlp.gate.weight",)},
    "fp32-accumulation": {"stage": 1, "precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "momentum": {
        "stage": 1,
        "config": {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
        | {"zero_allow_untested_optimizer": True},
    },
}


WITH_MANIFEST = ("frozen-experts", "frozen-experts-zero-0")
"""Cases that ask the manifest for more than names, which the files have too. In all other cases the files are enough."""


@pytest.mark.parametrize(
    ("key", "manifest"),
    [*((key, True) for key in WITH_MANIFEST), *((key, False) for key in SETTINGS if key != WITH_MANIFEST[1])],
)
def test_settings(key: str, manifest: bool, ranks: Ranks, tmp_path: Path) -> None:
    """With the manifest, and as stock DeepSpeed writes it: stage 0, which names no parameters, only with."""
    settings = SETTINGS[key]
    source = autoep(2, **settings)
    written = source if manifest else replace(source, universal=None)
    expected = ranks(4).run(run_once, written, STEPS, str(tmp_path / "a"))[0]["loss"]
    stage = 1 if "frozen" in settings else 3 - settings["stage"]
    target = autoep(4, **{**settings, "stage": stage, "zero": {}})
    found = ranks(4).run(run_once, target, 0, str(tmp_path / "b"), str(tmp_path / "a"))
    assert "precision" in settings or abs(found[0]["loss"] - expected) < BOUND
    ranks(4).run(run_once, source, 0, str(tmp_path / "c"), str(tmp_path / "b"))
    assert differences(tmp_path / "a" / "step", tmp_path / "b" / "step") == []
    assert differences(tmp_path / "a" / "step", tmp_path / "c" / "step") == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_topology(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Left to DeepSpeed, which alone loads it too; and the loss is the one that a universal load leads to."""
    source = autoep(2, stage, universal={"enabled": True})
    expected = ranks(4).run(run_once, source, STEPS, str(tmp_path / "a"))
    for universal in ({"enabled": True}, None, UNIVERSAL):
        run = replace(source, universal=universal)
        found = ranks(4).run(run_once, run, 0, str(tmp_path / str(universal)), str(tmp_path / "a"))
        assert [rank["loss"] for rank in found] == [rank["loss"] for rank in expected]
        assert all((rank["report"] is not None) == (universal == UNIVERSAL) for rank in found)


def folded(ep: int, stage: int) -> Run:
    """A run with AutoTP too, on TP2: its ranks hold different experts."""
    return autoep(ep, stage, tp=2, config={"tensor_parallel": {"autotp_size": 2, "preset_model": "mixtral"}})


def test_under_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    """From the plain model to TP2 with AutoEP, other sizes and stages, and TP1 in between; stage 0 has a file for each rank."""
    source = plain(1)
    first = ranks(2).run(run_once, source, STEPS, str(tmp_path / "0"))[0]
    expected = logits_of_whole(source, tmp_path / "0" / "step", tmp_path / "whole")
    chain = [(folded(2, 1), 4), (folded(4, 3), 4), (autoep(2, 0), 2), (folded(4, 0), 4), (folded(2, 2), 2)]
    for number, (run, world) in enumerate(chain, start=1):
        before, after = tmp_path / str(number - 1), tmp_path / str(number)
        for found in ranks(world).run(run_once, run, 0, str(after), str(before)):
            assert float((found["logits"] - expected).abs().max()) <= BOUND
            assert abs(found["loss"] - first["loss"]) < BOUND
        assert shared_differences(tmp_path / "1" / "step", after / "step") == []
    error = refusal(ranks, 2, source, str(tmp_path / "back"), str(tmp_path / "5"))
    assert isinstance(error, UnsupportedError) and "model.layers.0.mlp in other tensors than the model" in str(error)


@pytest.mark.parametrize(("source", "targets"), [(1, ((4, 4, 3), (1, 2, 1))), (3, ((2, 4, 1), (1, 1, 0)))])
def test_command_line(source: int, targets: tuple[Any, ...], ranks: Ranks, tmp_path: Path) -> None:
    """Each rank reads what ``ucp plan`` says. ``ucp diff`` finds nothing, also in a universal checkpoint."""
    ranks(2).run(run_once, autoep(2, source), STEPS, str(tmp_path / "a"))
    saved = tmp_path / "a" / "step"
    for ep, world, stage in targets:
        run, after = autoep(ep, stage), tmp_path / f"ep{ep}"
        found = ranks(world).run(run_once, run, 0, str(after), str(tmp_path / "a"))
        plan = plan_target(open_checkpoint(saved), Topology(1, 1, world, stage, ep))
        assert [rank.bytes_read for rank in plan.ranks] == [rank["report"].bytes_read for rank in found]
        assert ucp("diff", saved, after / "step") == 0
    assert ucp("convert", saved, tmp_path / "u") == 0
    assert ucp("inspect", tmp_path / "u") == ucp("inspect", saved) == ucp("diff", saved, tmp_path / "u") == 0
    ranks(1).run(run_once, plain(1), 0, str(tmp_path / "plain"), str(tmp_path / "u"))
    assert ucp("diff", saved, tmp_path / "plain" / "step") == 0
    assert ucp("plan", saved, "--dp", 3, "--zero", 1, "--ep", 3) == 1
    changed = plan_target(open_checkpoint(saved), Topology(dp=2), model=open_checkpoint(tmp_path / "plain"))
    assert changed.possible and "model.layers.0.mlp.experts.gate_up_proj" in changed.restored


def ucp(*arguments: Any) -> int:
    """Exit status of a command."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments]).exit_code


def load_by_function(run: Run, load: str) -> None:
    """On a rank: load with a function that moves the weights."""
    build_engine(run).load_checkpoint(load, custom_load_fn=print)


def refusal(ranks: Ranks, world: int, run: Run, *arguments: Any) -> BaseException:
    """Return the error that a rank raises."""
    with pytest.raises(RankError) as caught:
        ranks(world).run(run_once, run, 0, *arguments)
    assert caught.value.original is not None
    return caught.value.original


def test_another_number_of_experts(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(run_once, autoep(2, 1), STEPS, str(tmp_path / "a"))
    more = {"num_local_experts": 6}
    for run, name in ((autoep(2, 1, size=more), "w1"), (plain(1, **more), "gate_up_proj")):
        error = refusal(ranks, 2, run, str(tmp_path / "b"), str(tmp_path / "a"))
        assert isinstance(error, MismatchError)
        assert any(problem.startswith(f"model.layers.0.mlp.experts.{name}: ") for problem in error.problems)
    grown = autoep(2, 3, size=more, universal={**UNIVERSAL, "on_missing": "init"})
    ranks(2).run(run_once, grown, 0, str(tmp_path / "c"), str(tmp_path / "a"))
    assert open_checkpoint(tmp_path / "c").parameters["model.layers.1.mlp.experts.w2"].local_shapes[0][0] == 6  # type: ignore[index]


def test_what_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """By DeepSpeed experts that don't divide; by this package what the files don't tell, or don't hold."""
    uneven = refusal(ranks, 3, autoep(3, 1, config={"train_batch_size": 9}), str(tmp_path / "a"))
    assert "num_experts=4 in layer 'model.layers.0.mlp' is not divisible by autoep_size=3" in str(uneven)
    ranks(2).run(run_once, autoep(2, 0, universal=None), STEPS, str(tmp_path / "stock"))
    error = refusal(ranks, 2, autoep(1, 1), str(tmp_path / "b"), str(tmp_path / "stock"))
    assert isinstance(error, MismatchError) and "names no parameters in its optimizer state" in str(error)
    ranks(2).run(run_once, autoep(2, 0), STEPS, str(tmp_path / "c"))
    with pytest.raises(RankError, match="custom_load_fn can't be used with layers of DeepSpeed's AutoEP"):
        ranks(2).run(load_by_function, autoep(2, 0), str(tmp_path / "c"))
    (tmp_path / "c" / "step" / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="layer_1_expert_3_mp_rank_00_model_states"):
        open_checkpoint(tmp_path / "c")
